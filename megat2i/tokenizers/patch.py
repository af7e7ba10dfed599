"""PatchTokenizer: an image as a mosaic of small RGB patches from a codebook fitted by k-means.

The plainest image tokenizer there is: needs no training run, encodes hundreds of images a second on one CPU core, and
its blocky pictures show exactly what the language model wrote.

Patches are compared by brightness and two differences of colours (YCoCg-R: Malvar and Sullivan 2003) instead of by RGB:
a small codebook then gets the colours right first, which people notice most. The transform maps whole numbers to whole
numbers and back. Distances are therefore sums of products of small integers, which float32 computes without rounding
for patches of up to 9 x 9 pixels, so the codes of an image are the same on every machine, with any number of threads
and in any batch; and decoding an image's codes and encoding the result gives the codes back.
"""

import hashlib
from pathlib import Path

import torch

from megat2i.data.images import CROPS
from megat2i.files import DataFileError
from megat2i.tokenizers.kmeans import CHUNK, nearest, weighted_kmeans
from megat2i.tokenizers.tokenizer_file import REMEDY, read_tokenizer_file, tokenizer_file_content, write_tokenizer_file

FIT_PATCHES = 1 << 19  # patches that the codebook is fitted on; more cost time and change little


class PatchTokenizer:
    """``codebook`` uint8 [codes, 3, p, p]; images of ``image_size`` pixels (any multiple of p works).

    ``sha256`` is that of the file it was loaded from, or that ``save`` will write. ``crop`` is that of the images that
    the codebook was fitted to; later datasets take it over.
    """

    kind = "patch"
    crop = "center"
    encoder_precision = "float32"

    def __init__(self, codebook: torch.Tensor, image_size: int, sha256: str | None = None, crop: str = crop):
        codes, _, patch, _ = codebook.shape
        if image_size % patch:
            raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch}")
        self.codebook, self.image_size, self.crop = codebook.contiguous(), image_size, crop
        self.codebook_size, self.patch_size = codes, patch
        self.grid = (image_size // patch, image_size // patch)
        self.sha256 = sha256 or hashlib.sha256(self._content()).hexdigest()
        self._centres = _colours(codebook.reshape(codes, -1)).float()

    @classmethod
    def fit(
        cls, images: torch.Tensor, patch_size: int, codebook_size: int, seed: int = 0, crop: str = crop
    ) -> "PatchTokenizer":
        """Fit the codebook to ``images`` uint8 [N, 3, size, size]. The same images and seed give the same codebook.

        Raises ValueError where the images have fewer distinct patches than ``codebook_size``.
        """
        side = images.shape[-1]
        if side % patch_size:
            raise ValueError(f"image size {side} is not a multiple of the patch size {patch_size}")
        patches = _cut(images, patch_size)
        if len(patches) > FIT_PATCHES:
            chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))[:FIT_PATCHES]
            patches = patches[chosen]
        centres = weighted_kmeans(_colours(patches), codebook_size, seed, lambda x: _colours(_pixels(x)).float())
        return cls(_pixels(centres).reshape(codebook_size, 3, patch_size, patch_size), side, crop=crop)

    def to(self, device: torch.device | str) -> "PatchTokenizer":
        """Nothing changes: the search is one for the CPU, whatever device the rest of a job uses."""
        return self

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, rows * columns] of ``images`` uint8 [B, 3, H, W]: the nearest patch, the first of equals."""
        patch, (height, width) = self.patch_size, images.shape[-2:]
        if images.dtype != torch.uint8 or height % patch or width % patch:
            problem = f"{images.dtype} [{height} x {width}]"
            raise ValueError(f"expected uint8 images whose sides are multiples of {patch} pixels, got {problem}")
        codes = [nearest(_colours(part).float(), self._centres)[0] for part in _cut(images, patch).split(CHUNK)]
        return torch.cat(codes).reshape(len(images), -1)

    def decode(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Images uint8 [B, 3, rows * p, columns * p] of ``codes`` [B, rows * columns]; ``grid`` = (rows, columns)."""
        rows, columns = grid or self.grid
        if codes.ndim != 2 or codes.shape[1] != rows * columns:
            raise ValueError(f"codes of shape {list(codes.shape)} do not fill a grid of {rows} x {columns}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"codes {int(codes.min())} to {int(codes.max())} are outside 0..{self.codebook_size - 1}")
        patches = self.codebook.to(codes.device)[codes].unflatten(1, (rows, columns))  # [B, rows, columns, 3, p, p]
        side = self.patch_size
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(codes), 3, rows * side, columns * side)

    def save(self, path: str | Path) -> None:
        """Write the safetensors file atomically; its SHA-256 is ``sha256``."""
        write_tokenizer_file(path, self._content())

    @classmethod
    def load(cls, path: str | Path) -> "PatchTokenizer":
        """Read what ``save`` wrote. Raises DataFileError."""
        return cls.from_file(path, *read_tokenizer_file(path))

    @classmethod
    def from_file(cls, path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict, sha256: str):
        """The tokenizer in an opened file (see ``load_image_tokenizer``). Raises DataFileError."""
        codebook, image_size = tensors.get("codebook"), metadata.get("image_size")
        if metadata.get("kind") != cls.kind or codebook is None or codebook.dtype != torch.uint8:
            raise DataFileError(path, "not a patch tokenizer: kind 'patch' and a uint8 tensor 'codebook'", REMEDY)
        if codebook.ndim != 4 or codebook.shape[1] != 3 or codebook.shape[2] != codebook.shape[3] or not len(codebook):
            problem = f"codebook of shape {list(codebook.shape)}, expected [codes, 3, p, p]"
            raise DataFileError(path, problem, REMEDY)
        if type(image_size) is not int or image_size < 1 or image_size % codebook.shape[2]:
            problem = f"image_size {image_size!r} is no multiple of the patch size {codebook.shape[2]}"
            raise DataFileError(path, problem, REMEDY)
        crop = metadata.get("crop", cls.crop)
        if crop not in CROPS:
            raise DataFileError(path, f"crop {crop!r} is none of {', '.join(CROPS)}", REMEDY)
        return cls(codebook, image_size, sha256, crop)

    def _content(self) -> bytes:
        metadata = {"kind": self.kind, "image_size": self.image_size}
        if self.crop != type(self).crop:  # files of older releases, which lack it, keep their bytes
            metadata["crop"] = self.crop
        return tokenizer_file_content({"codebook": self.codebook}, metadata)


def _cut(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Patches uint8 [B * rows * columns, 3 * p * p] of ``images`` uint8 [B, 3, H, W], row by row."""
    batch, channels, height, width = images.shape
    blocks = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * patch * patch)


def _colours(patches: torch.Tensor) -> torch.Tensor:
    """Patches uint8 [N, 3 * p * p] as int16 of the same shape: Y - 128, Co and Cg of every pixel."""
    red, green, blue = patches.to(torch.int16).chunk(3, dim=1)
    orange = red - blue
    middle = blue + (orange >> 1)
    emerald = green - middle
    return torch.cat((middle + (emerald >> 1) - 128, orange, emerald), dim=1)


def _pixels(colours: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_colours`` for its values, rounded, as uint8; what is no pixel becomes the nearest one."""
    light, orange, emerald = colours.round().to(torch.int16).chunk(3, dim=1)
    middle = light + 128 - (emerald >> 1)
    blue = middle - (orange >> 1)
    return torch.cat((blue + orange, emerald + middle, blue), dim=1).clamp(0, 255).to(torch.uint8)
