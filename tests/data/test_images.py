"""Decoding untrusted image bytes: every kind comes out upright, RGB and on white; nothing hostile gets through."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megat2i.data.images import UnreadableImage, decode_image, fit_square, read_image_file, to_tensor


def encoded(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def half_and_half(mode="RGB", size=(64, 48), left="red", right="blue"):
    """Left half in one colour, right half in another."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def corners(content, size=32):
    """Colours near the upper left and the upper right corner, as lists of int."""
    pixels = np.asarray(decode_image(content, size))
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    return pixels[2, 2].tolist(), pixels[2, -3].tolist()


def near(first, second, tolerance=6):
    return max(abs(a - b) for a, b in zip(first, second, strict=True)) <= tolerance


RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


@pytest.mark.parametrize(
    "content",
    [
        encoded(half_and_half()),
        encoded(half_and_half(), "JPEG", quality=95, subsampling=0),
        encoded(half_and_half(), "WEBP", lossless=True),
        encoded(half_and_half("RGBA")),
        encoded(half_and_half().convert("P", palette=Image.Palette.ADAPTIVE)),
    ],
    ids=["png", "jpeg", "webp", "rgba", "palette"],
)
def test_kinds_of_colour(content):
    left, right = corners(content)
    assert near(left, RED) and near(right, BLUE)


def test_cmyk():
    content = encoded(half_and_half("CMYK", left=(0, 255, 255, 0), right=(255, 255, 0, 0)), "JPEG", quality=95)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    left, right = corners(content)
    assert near(left, RED) and near(right, BLUE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    if mode == "P":
        image = half_and_half("P", left=0, right=1)
        image.putpalette([255, 0, 0, 0, 0, 0])
        content = encoded(image, transparency=1)
    else:
        transparent = (0, 0, 0, 0) if mode == "RGBA" else (0, 0)
        content = encoded(half_and_half(mode, left="black", right=transparent))
    left, right = corners(content)
    assert right == WHITE and left != WHITE


def test_grey_of_16_bits_keeps_its_range():
    pixels = np.full((48, 64), 0x4000, dtype=np.uint16)
    pixels[:, 32:] = 0xC000
    content = encoded(Image.fromarray(pixels))
    assert Image.open(io.BytesIO(content)).mode.startswith("I")
    assert corners(content) == ([0x40] * 3, [0xC0] * 3)


def test_black_and_white():
    assert corners(encoded(half_and_half("1", left=0, right=1))) == ([0, 0, 0], WHITE)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(format):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    options = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}}[format]
    pixels = np.asarray(decode_image(encoded(half_and_half(), format, exif=exif, **options), 32))
    assert pixels.shape == (64, 48, 3)
    assert near(pixels[2, 20].tolist(), RED) and near(pixels[-3, 20].tolist(), BLUE)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes whose header promises width x height pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (9_000, 8_000), (13_000, 7_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as images.py has it outside of pytest
def test_a_decompression_bomb_is_refused_by_its_header(width, height):
    with pytest.raises(UnreadableImage, match="more than 64 megapixels"):
        decode_image(png_claiming(width, height), 32)
    with pytest.raises(UnreadableImage) as control:  # the same bytes with a permitted size fail while decoding
        decode_image(png_claiming(900, 800), 32)
    assert "megapixels" not in str(control.value)


def test_truncated_and_foreign_files_are_refused():
    jpeg = encoded(half_and_half(size=(200, 200)), "JPEG")
    decode_image(jpeg, 32)
    gif, tiff = encoded(half_and_half(), "GIF"), encoded(half_and_half(), "TIFF")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    for content in (b"", b"text", jpeg[:-40], jpeg[: len(jpeg) // 2], gif, tiff, eps):
        with pytest.raises(UnreadableImage) as error:
            decode_image(content, 32)
        assert "0x" not in str(error.value)  # an address would make ledgers differ from run to run


@given(st.data())
def test_damaged_files_decode_or_are_refused_and_nothing_else(data):
    format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    content = bytearray(encoded(half_and_half(), format))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content), 32)
    except UnreadableImage:
        return
    assert image.mode == "RGB"


def test_a_large_jpeg_is_reduced_while_decoding_but_not_below_twice_the_size():
    large = encoded(half_and_half(size=(1600, 1200)), "JPEG", quality=95)
    assert decode_image(large, 32).size == (200, 150)  # an eighth, the most that JPEG offers
    assert decode_image(large, 256).size == (800, 600)
    assert decode_image(large, 1000).size == (1600, 1200)


def test_center_crop_cuts_the_middle_and_pad_keeps_everything():
    stripes = Image.new("RGB", (96, 32), "blue")
    stripes.paste("red", (32, 0, 64, 32))
    assert np.asarray(fit_square(stripes, 16, "center")).reshape(-1, 3).tolist() == [RED] * 256
    padded = np.asarray(fit_square(stripes, 96, "pad"))
    assert padded[0, 0].tolist() == WHITE == padded[-1, -1].tolist()
    assert (padded[48, 5].tolist(), padded[48, 48].tolist(), padded[48, 90].tolist()) == (BLUE, RED, BLUE)
    assert fit_square(Image.new("RGB", (4000, 1)), 16, "pad").size == (16, 16)
    assert fit_square(Image.new("RGB", (1, 1)), 16, "center").size == (16, 16)
    with pytest.raises(ValueError, match="none of center, pad"):
        fit_square(stripes, 16, "zoom")


def test_tensor_layout():
    tensor = to_tensor(half_and_half(size=(6, 4)))
    assert tensor.shape == (3, 4, 6)
    assert tensor[:, 0, 0].tolist() == RED and tensor[:, 0, 5].tolist() == BLUE


def test_files_that_never_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    (tmp_path / "image.png").write_bytes(encoded(half_and_half()))
    for name in ("pipe.png", "link.png"):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            read_image_file(tmp_path / name)
    with pytest.raises(UnreadableImage, match="directory"):
        read_image_file(tmp_path)
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image_file(tmp_path / "none.png")
    assert decode_image(read_image_file(tmp_path / "image.png"), 32).size == (64, 48)


def progressive(side: int, scans: int) -> bytes:
    """A blank progressive JPEG whose last scan is there so often that it has ``scans``."""
    content = encoded(Image.new("L", (side, side)), "JPEG", quality=1, progressive=True)
    last = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + last * (scans - content.count(b"\xff\xda")) + b"\xff\xd9"


def refusal(content: bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode_image(content, 8)
    return str(caught.value)


def test_scans_of_a_jpeg_are_counted_before_it_is_decoded():
    assert decode_image(progressive(16, 100), 8).size == (16, 16)
    assert refusal(progressive(16, 10_900)) == "10,900 scans, more than 100 for 16 x 16 pixels"
    assert refusal(progressive(7990, 26)) == "26 scans, more than 25 for 7,990 x 7,990 pixels"


def test_what_only_looks_like_scans_is_none():
    content = encoded(half_and_half(), "JPEG", progressive=True)
    segment = b"\xff\xe5" + (2 + 400).to_bytes(2, "big") + b"\xff\xda" * 200
    with_trailer = content[:2] + segment + content[2:] + b"\xff\xda" * 1000
    assert near(corners(with_trailer)[0], RED)


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.new("L", (8, 8)), "JPEG")[:2] + b"\xff\xfe\0\2" * 70_000 + b"\xff\xda",
        encoded(Image.new("L", (8, 8)), "JPEG")[:2] + b"\xff" * 70_000 + b"\xff\xda",
        encoded(Image.new("L", (8, 8)), "JPEG")[:2] + b"a" * 70_000 + b"\xff\xda",
        encoded(Image.new("L", (8, 8)))[:33] + chunk(b"abCd", b"") * 70_000,
    ],
    ids=["comments", "fill", "stray", "chunks"],
)
def test_millions_of_pieces_are_refused(content):
    assert refusal(content) == "its header has more than 65,536 pieces"


def test_a_side_has_a_limit_of_its_own():
    assert refusal(png_claiming(1, 64_000_000)) == "1 x 64,000,000 pixels, more than 65,535 a side"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_large_picture_is_made_rgb_band_by_band_and_reduced(monkeypatch, mode):
    image = Image.effect_noise((200, 150), 90).convert("RGB")
    if mode == "RGBA":
        image.putalpha(Image.effect_noise((200, 150), 90))
    content = encoded(image.convert("P") if mode == "P" else image)
    plain = decode_image(content, 16)
    monkeypatch.setattr("megat2i.data.images.BAND_PIXELS", 200 * 20)
    assert np.array_equal(decode_image(content, 16), plain), "bands change nothing"
    monkeypatch.setattr("megat2i.data.images.LARGE_BYTES", 0)
    assert np.array_equal(decode_image(content, 16), plain.reduce(150 // 32))


def test_one_large_picture_at_a_time(monkeypatch):
    inside = []

    class Turn:
        def __enter__(self):
            inside.append("in")

        def __exit__(self, *_):
            inside.append("out")

    monkeypatch.setattr("megat2i.data.images._turn", Turn())
    decode_image(encoded(half_and_half()), 8)
    assert inside == []
    monkeypatch.setattr("megat2i.data.images.LARGE_BYTES", 64 * 48 * 8 - 1)
    decode_image(encoded(half_and_half()), 8)
    assert inside == ["in", "out"]
