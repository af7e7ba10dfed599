"""The interface of image tokenizers, and opening one from its file.

A new kind is a module with a class of the interface below and its line in ``KINDS``.
"""

from pathlib import Path
from typing import Protocol

import torch

from megat2i.files import DataFileError
from megat2i.tokenizers.patch import PatchTokenizer
from megat2i.tokenizers.tokenizer_file import REMEDY, read_tokenizer_file

# Classes with ``kind`` and ``from_file(path, tensors, metadata, sha256)``.
KINDS = {kind.kind: kind for kind in (PatchTokenizer,)}


class ImageTokenizer(Protocol):
    """Images to codes and back. Codes are 0 .. ``codebook_size`` - 1, row by row from the upper left corner."""

    kind: str
    codebook_size: int
    image_size: int  # side of the square images that it is meant for, in pixels
    grid: tuple[int, int]  # (rows, columns) of codes of such an image
    encoder_precision: str  # arithmetic of the encoder: other arithmetic may give other codes
    sha256: str  # of the file, hexadecimal

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, rows * columns] of ``images`` uint8 [B, 3, H, W]."""

    def decode(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Images uint8 [B, 3, H, W] of ``codes`` [B, rows * columns]; ``grid`` where the image is not the usual one."""


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """The image tokenizer in ``path``, of the class that the file names. Raises DataFileError."""
    tensors, metadata, sha256 = read_tokenizer_file(path)
    kind = metadata.get("kind")
    if kind not in KINDS:
        raise DataFileError(path, f"image tokenizer kind {kind!r} is none of {', '.join(KINDS)}", REMEDY)
    return KINDS[kind].from_file(path, tensors, metadata, sha256)
