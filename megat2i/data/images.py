"""Untrusted image bytes to square RGB pixels: safe decoding, then a crop.

Only JPEG, PNG and WebP are tried, whatever a file calls itself: Pillow's other decoders (EPS runs Ghostscript) never
see the bytes. The size in the header is checked before a pixel is decoded.
"""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from megat2i.files import raise_if_transient

FORMATS = ("JPEG", "PNG", "WEBP")
MAXIMUM_PIXELS = 64_000_000
TOO_LARGE = f"more than {MAXIMUM_PIXELS // 1_000_000} megapixels"
MAXIMUM_BYTES = 256 * 2**20  # of an image file: more than 64 megapixels ever need
CROPS = ("center", "pad")
# Ours is the narrower limit. Set once: warnings.catch_warnings around each call would not be safe in threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class UnreadableImage(ValueError):
    """Bytes that are not an image we decode; the message says why."""


def decode_image(content: bytes, size: int) -> Image.Image:
    """The image in ``content`` as upright RGB, transparency on white, 16-bit grey as 8-bit.

    A large JPEG may come back reduced, with both sides still at least twice ``size`` pixels. Raises UnreadableImage.
    """
    if len(content) > MAXIMUM_BYTES:
        raise UnreadableImage(f"{len(content):,} bytes, more than {MAXIMUM_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > MAXIMUM_PIXELS:
            raise UnreadableImage(f"{width:,} x {height:,} pixels are {TOO_LARGE}")
        if image.format == "JPEG":
            image.draft(None, (2 * size, 2 * size))  # decodes at 1/2, 1/4 or 1/8 where that is enough
        return _upright_rgb(image)
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


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion differs between releases
        return Image.fromarray((np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
    return upright.convert("RGB")


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
        # Non-blocking: opening a pipe without a writer would otherwise wait for one. It changes nothing for a file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("not a regular file")
            if status.st_size > MAXIMUM_BYTES:
                raise UnreadableImage(f"{status.st_size:,} bytes, more than {MAXIMUM_BYTES:,}")
            return file.read(MAXIMUM_BYTES + 1)
    except OSError as error:
        raise_if_transient(path, error)
        raise UnreadableImage(error.strerror or str(error)) from error
