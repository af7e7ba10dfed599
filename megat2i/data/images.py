"""Untrusted image bytes to square RGB pixels: safe decoding, then a crop.

Only JPEG, PNG and WebP are tried, whatever a file calls itself: Pillow's other decoders (EPS runs Ghostscript) never
see the bytes. The size in the header is checked before a pixel is decoded, and so is what decoding would cost.
"""

import io
import threading
import warnings
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from megat2i.data.image_costs import LARGE_BYTES, decoding_bytes, pieces_problem, size_problem
from megat2i.files import DataFileError, read_regular_file

FORMATS = ("JPEG", "PNG", "WEBP")
MAXIMUM_PIXELS = 64_000_000
TOO_LARGE = f"more than {MAXIMUM_PIXELS // 1_000_000} megapixels"
MAXIMUM_BYTES = 256 * 2**20  # of an image file: more than 64 megapixels ever need
BAND_PIXELS = 1 << 22  # converted to RGB at a time
CROPS = ("center", "pad")
# Ours is the narrower limit. Set once: warnings.catch_warnings around each call would not be safe in threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # on EXIF data: thousands of lines for one picture


class UnreadableImage(ValueError):
    """Bytes that are not an image we decode; the message says why."""


_turn: AbstractContextManager = threading.Lock()  # held by whoever decodes a picture that needs much memory


def share_turn(lock: AbstractContextManager) -> None:
    """Take turns on pictures that need much memory by ``lock``, with the other processes that hold it."""
    global _turn
    _turn = lock


def decode_image(content: bytes, size: int) -> Image.Image:
    """The image in ``content`` as upright RGB, transparency on white, 16-bit grey as 8-bit.

    A large image may come back reduced, with both sides still at least twice ``size`` pixels. Raises UnreadableImage.
    """
    if len(content) > MAXIMUM_BYTES:
        raise UnreadableImage(f"{len(content):,} bytes, more than {MAXIMUM_BYTES:,}")
    if problem := pieces_problem(content):
        raise UnreadableImage(problem)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > MAXIMUM_PIXELS:
            raise UnreadableImage(f"{width:,} x {height:,} pixels are {TOO_LARGE}")
        if problem := size_problem(content, width, height):
            raise UnreadableImage(problem)
        if image.format == "JPEG":
            image.draft(None, (2 * size, 2 * size))  # decodes at 1/2, 1/4 or 1/8 where that is enough
        if decoding_bytes(image, width, height) <= LARGE_BYTES:
            return _upright_rgb(image, 1)
        with _turn:
            return _upright_rgb(image, max(1, min(image.size) // (2 * size)))
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not a JPEG, PNG or WebP image, or its header is damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"its pixels are {TOO_LARGE}") from error
    except Exception as error:
        # Broken files make Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, KeyError and others;
        # whatever it is, it is a statement about these bytes, and it is passed on with its text.
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _upright_rgb(image: Image.Image, factor: int) -> Image.Image:
    """``image`` as upright RGB, each side divided by ``factor``, a band of rows at a time."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    width, height = image.size
    rows = factor * max(1, BAND_PIXELS // (width * factor))
    if factor == 1 and rows >= height:
        return _rgb(image)
    upright = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        band = _rgb(image.crop((0, top, width, min(height, top + rows))))
        upright.paste(band.reduce(factor), (0, top // factor))
    return upright


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion differs between releases
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit_square(image: Image.Image, size: int, crop: str) -> Image.Image:
    """``image`` (RGB) as ``size`` x ``size`` pixels.

    ``center`` cuts the largest square from the middle, ``pad`` keeps the whole image and fills up with white. A very
    flat image under ``pad`` keeps at least one row or column.
    """
    width, height = image.size
    if crop == "center":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = image.crop((left, top, left + side, top + side))  # resize(box=...) would mix in pixels around the box
        return square.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if crop == "pad":
        scale = size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        square = Image.new("RGB", (size, size), "white")
        resized = image.resize(inner, Image.Resampling.LANCZOS, reducing_gap=3.0)
        square.paste(resized, ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return square
    raise ValueError(f"crop {crop!r} is none of {', '.join(CROPS)}")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image_file(path: str | Path) -> bytes:
    """The bytes of an image file. Raises UnreadableImage: also for a device or pipe, which could deliver forever."""
    try:
        return read_regular_file(path, MAXIMUM_BYTES)
    except DataFileError:
        raise
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    except ValueError as error:
        raise UnreadableImage(str(error)) from error
