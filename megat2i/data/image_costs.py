"""What an image would cost to decode, by the numbers of its format, before a decoder sees it.

Decoders cannot be stopped once they run, and a small file can ask for minutes and gigabytes: a JPEG by its scans, each
of which goes over all pixels; JPEG and PNG by millions of empty pieces.
"""

import re

from PIL import Image

MAXIMUM_SCANS = 100  # of a JPEG: progressive ones have about 10
MAXIMUM_SCANNED_PIXELS = 1_600_000_000  # pixels x scans: 25 scans of 64 megapixels
MAXIMUM_PIECES = 1 << 16  # chunks of a PNG, or segments, fill bytes and stray bytes before the first scan of a JPEG
MAXIMUM_SIDE = 65_535  # pixels: what JPEG has room for. Decoders keep a pointer for every row
LARGE_BYTES = 1 << 28  # of memory: pictures that need more are decoded one at a time

# Start of the next piece of a JPEG, behind fill bytes. Escaped bytes and restart marks belong to the pixels.
_MARKER = re.compile(rb"\xff+[^\x00\x01\xd0-\xd8\xff]")
_SCAN, _END = 0xDA, 0xD9
# Bytes a pixel while one is decoded, of the decoder and of the picture that it fills. Measured.
_WEBP_BYTES, _PLAIN_BYTES, _PROGRESSIVE_BYTES = 20, 8, 8


def pieces_problem(content: bytes) -> str | None:
    """What is wrong with the pieces that the image file ``content`` is made of, or None."""
    if content.startswith(b"\xff\xd8"):
        pieces = _jpeg_pieces(content)
    elif content.startswith(b"\x89PNG"):
        pieces = _png_chunks(content)
    else:
        return None
    return f"its header has more than {MAXIMUM_PIECES:,} pieces" if pieces > MAXIMUM_PIECES else None


def size_problem(content: bytes, width: int, height: int) -> str | None:
    """What makes ``content``, an image of so many pixels, too costly to decode, or None."""
    if max(width, height) > MAXIMUM_SIDE:
        return f"{width:,} x {height:,} pixels, more than {MAXIMUM_SIDE:,} a side"
    if not content.startswith(b"\xff\xd8"):
        return None
    allowed = max(1, min(MAXIMUM_SCANS, MAXIMUM_SCANNED_PIXELS // (width * height)))
    # The quick count also finds what only looks like a scan, in thumbnails and profiles.
    if content.count(b"\xff\xda") > allowed and (scans := _jpeg_scans(content)) > allowed:
        return f"{scans:,} scans, more than {allowed} for {width:,} x {height:,} pixels"
    return None


def decoding_bytes(image: Image.Image, width: int, height: int) -> int:
    """About how much memory decoding the opened ``image`` takes whose file says ``width`` x ``height`` pixels."""
    drawn = image.size[0] * image.size[1]  # of a JPEG maybe fewer pixels than in the file
    if image.format == "WEBP":
        return _WEBP_BYTES * drawn
    coefficients = _PROGRESSIVE_BYTES * width * height if image.info.get("progressive") else 0
    return _PLAIN_BYTES * drawn + coefficients


def _png_chunks(content: bytes) -> int:
    """Chunks of a PNG; counting ends beyond MAXIMUM_PIECES."""
    position, chunks = 8, 0
    while position < len(content) and chunks <= MAXIMUM_PIECES:
        position += 12 + int.from_bytes(content[position : position + 4])
        chunks += 1
    return chunks


def _jpeg_pieces(content: bytes) -> int:
    """Segments, fill bytes and stray bytes before the first scan; counting ends beyond MAXIMUM_PIECES."""
    position, pieces = 2, 0
    while pieces <= MAXIMUM_PIECES and (found := _MARKER.search(content, position)):
        pieces += found.end() - position - 1
        if content[found.end() - 1] in (_SCAN, _END):
            return pieces
        position = _behind(content, found)
    return pieces + len(content) - position


def _jpeg_scans(content: bytes) -> int:
    """Scans up to the end of the first picture in ``content``."""
    position, scans = 2, 0
    while found := _MARKER.search(content, position):
        kind = content[found.end() - 1]
        if kind == _END:
            break
        scans += kind == _SCAN
        position = _behind(content, found)
    return scans


def _behind(content: bytes, marker: re.Match) -> int:
    """Where the segment ends that ``marker`` begins."""
    return marker.end() + max(2, int.from_bytes(content[marker.end() : marker.end() + 2]))
