"""The interface of image tokenizers, the kinds there are, and opening one from its file.

A new kind is a module with a class of the interface below and its entry in ``KINDS``.
"""

from pathlib import Path
from typing import Protocol, Self

import torch

from megat2i.files import DataFileError
from megat2i.tokenizers.llamagen_vq import LlamaGenVQ
from megat2i.tokenizers.movqgan import MoVQGAN
from megat2i.tokenizers.patch import PatchTokenizer
from megat2i.tokenizers.tokenizer_file import REMEDY, read_tokenizer_file

NETWORKS = {kind.kind: kind for kind in (MoVQGAN, LlamaGenVQ)}  # made from other people's checkpoints
KINDS = {PatchTokenizer.kind: PatchTokenizer, **NETWORKS}


class ImageTokenizer(Protocol):
    """Images to codes and back. Codes are 0 .. ``codebook_size`` - 1, row by row from the upper left corner."""

    kind: str  # its name in ``KINDS`` and in its file
    crop: str  # how images become square unless the user says otherwise: see ``encode_part.CROPS``
    codebook_size: int
    image_size: int  # side of the square images that it is meant for, in pixels
    grid: tuple[int, int]  # (rows, columns) of codes of such an image
    encoder_precision: str  # arithmetic of ``encode``, which obeys a change: other arithmetic may give other codes
    sha256: str  # of the file, hexadecimal

    @classmethod
    def from_file(cls, path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict, sha256: str) -> Self:
        """The tokenizer in an opened file, on the CPU. Raises DataFileError."""

    def to(self, device: torch.device | str) -> Self:
        """Compute on ``device`` from now on."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, rows * columns] of ``images`` uint8 [B, 3, H, W], on the device of the images."""

    def decode(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Images uint8 [B, 3, H, W] of ``codes`` [B, rows * columns]; ``grid`` where the image is not the usual one."""


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """The image tokenizer in ``path``, of the class that the file names. Raises DataFileError."""
    tensors, metadata, sha256 = read_tokenizer_file(path)
    kind = metadata.get("kind")
    if kind not in KINDS:
        raise DataFileError(path, f"image tokenizer kind {kind!r} is none of {', '.join(KINDS)}", REMEDY)
    return KINDS[kind].from_file(path, tensors, metadata, sha256)
