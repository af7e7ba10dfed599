"""Captioned images as every source yields them: samples, refused samples, parts of the work, clean captions."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

BLOCK = 256  # samples of a part where the input has no pieces of its own
CAPTION_KEYS = ("caption", "text")  # of a JSON object
MAXIMUM_CAPTION_BYTES = 2**20  # of a caption, or of the file that holds one alone
LEDGER_TEXT = 1000  # characters of a name or a reason
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Sample:
    """A captioned image; ``image(size)`` decodes it to RGB (at least about 2 x ``size``) or raises UnreadableImage."""

    name: str
    caption: str
    image: Callable[[int], Image.Image]


@dataclass(frozen=True)
class Refused:
    """A sample, or the unreadable rest of a file (``name`` says from where), that cannot be used."""

    name: str
    reason: str

    def ledger_row(self, source: str) -> dict[str, str]:
        """Its row in the ledger; names and reasons are other people's text, and may be long."""
        return {"source": source, "sample": shortened(self.name), "reason": shortened(self.reason)}


class Part(Protocol):
    """A piece of work."""

    source: str  # the input it belongs to, as the user wrote it
    expected: int | None  # samples, where that is known without reading
    opens_source: bool  # whether it is the first part of its source

    def identity(self) -> str:
        """Changes when what the part would read changes: names, sizes and times of modification of its files."""

    def samples(self) -> Iterator[Sample | Refused]:
        """The samples in their order. Only a sample's ``image`` decodes it: at any time, in any thread."""


def shortened(text: str) -> str:
    """``text``, with its middle left out where it is longer than LEDGER_TEXT."""
    half = LEDGER_TEXT // 2
    return text if len(text) <= LEDGER_TEXT else f"{text[:half]} ... {text[-half:]}"


def file_identity(path: str | Path) -> str:
    """Name, size and time of modification of a file, or that it is missing."""
    try:
        status = os.stat(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return f"{path}: {status.st_size} bytes, modified {status.st_mtime_ns}"


def first_caption(row: dict):
    """The first value under CAPTION_KEYS that is no empty text, else the first one; None where there is no such key."""
    values = [row[key] for key in CAPTION_KEYS if key in row]
    filled = (value for value in values if value is not None and not (isinstance(value, str) and not value.strip()))
    return next(filled, values[0] if values else None)


def clean_caption(value) -> str:
    """The caption in ``value``, stripped of outer white space. ValueError with the reason where it holds none."""
    if value is None:
        raise ValueError("no caption")
    if not isinstance(value, str):
        raise ValueError(f"the caption is {type(value).__name__}, not text")
    caption = value.removeprefix("\ufeff").strip()
    if not caption:
        raise ValueError("empty caption")
    if len(caption) > MAXIMUM_CAPTION_BYTES:
        raise ValueError(f"a caption of {len(caption):,} characters, more than {MAXIMUM_CAPTION_BYTES:,}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the caption is not valid Unicode (a lone surrogate)") from error
    return caption


def decode_caption(content: bytes) -> str:
    """The caption in the bytes of a text file. ValueError with the reason where it holds none."""
    try:
        return clean_caption(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError("the caption is not UTF-8") from error
