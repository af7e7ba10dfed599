"""MoVQGAN: SBER's image tokenizer, as the paper uses it (256 x 256 pixels to 32 x 32 of 16,384 codes).

The graph is MoVQ's (Zheng et al. 2022): a VQGAN whose decoder norms are modulated by the quantised vectors. State
dicts have the original's keys, so the published files (67M, 102M, 270M) load as they are. The original and its weights
carry no licence: neither is here, and the user names the file.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from megat2i.files import DataFileError
from megat2i.tokenizers.vq_tokenizer import VQTokenizer
from megat2i.tokenizers.vqgan import GROUPS, Architecture

# Fields of the original's configuration whose only accepted values these are; and those that inference does not need.
FIXED = {"double_z": False, "in_channels": 3, "out_ch": 3}
UNUSED = {"dropout"}
NEEDED = {"z_channels", "resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions"}


def prepare(image: Image.Image, size: int = 256) -> Tensor:
    """``image`` of any mode as uint8 [3, size, size], bit for bit as the original's loader does it.

    The largest central square, bicubic after a box reduction by whole numbers, RGB last. Like the original it ignores
    the orientation in EXIF data, and resizes palette images without interpolation.
    """
    width, height = image.size
    side = min(width, height)
    # Halves of a pixel stay in: Pillow rounds each edge to even, so odd surpluses give squares one pixel off.
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    square = image.crop(box).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=1)
    return torch.from_numpy(np.array(square.convert("RGB"))).permute(2, 0, 1).contiguous()


class SpatialNorm(nn.Module):
    """Group norm, multiplied and shifted at every position by linear functions of the quantised vector there."""

    def __init__(self, channels: int, embed_dim: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.conv_y, self.conv_b = (nn.Conv2d(embed_dim, channels, 1) for _ in range(2))

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        # Applied before the guide is enlarged: the same numbers, from up to 64 times fewer positions.
        scale, shift = self.conv_y(guide), self.conv_b(guide)
        if x.shape[2:] != guide.shape[2:]:
            scale, shift = (F.interpolate(part, size=x.shape[2:], mode="nearest") for part in (scale, shift))
        return torch.addcmul(shift, self.norm_layer(x), scale)


class MoVQGAN(VQTokenizer):
    """See ``VQTokenizer``; ``from_checkpoint`` takes "67M", "102M", "270M" or the original's configuration."""

    kind = "movqgan"
    crop = "movq"
    sizes = {
        name: Architecture(channels, (1, 2, 2, 4), blocks, (3,), z_channels=4, embed_dim=4, codes=16384)
        for name, channels, blocks in (("67M", 128, 2), ("102M", 128, 4), ("270M", 256, 2))
    }

    @classmethod
    def architecture(cls, config: str | dict) -> Architecture:
        """Of a published size, or of a dict of the original's ``ddconfig``, ``n_embed`` and ``embed_dim``."""
        if isinstance(config, str):
            return super().architecture(config)
        inner = config.get("ddconfig")
        if set(config) != {"ddconfig", "n_embed", "embed_dim"} or not isinstance(inner, dict):
            raise ValueError(f"a MoVQGAN configuration has ddconfig, n_embed and embed_dim, not {sorted(config)}")
        if odd := NEEDED - set(inner) | set(inner) - NEEDED - set(FIXED) - UNUSED:
            raise ValueError(f"ddconfig: {', '.join(sorted(odd))} missing or unknown")
        for name, value in FIXED.items():
            if inner.get(name, value) != value:
                raise ValueError(f"ddconfig: {name} is {inner[name]}, only {value} is an image tokenizer's")
        for name in ("ch_mult", "attn_resolutions"):
            if not isinstance(inner[name], Sequence):
                raise ValueError(f"ddconfig: {name} is {inner[name]!r}, expected a list")
        levels, resolution = len(inner["ch_mult"]), inner["resolution"]
        if type(resolution) is not int or levels < 1 or resolution % 2 ** (levels - 1):
            raise ValueError(f"ddconfig: resolution {resolution} cannot be halved for {levels} levels")
        return Architecture(
            channels=inner["ch"],
            multipliers=tuple(inner["ch_mult"]),
            blocks=inner["num_res_blocks"],
            # Decided by the resolution of the configuration, not of the image at hand.
            attention=tuple(i for i in range(levels) if resolution // 2**i in inner["attn_resolutions"]),
            z_channels=inner["z_channels"],
            embed_dim=config["embed_dim"],
            codes=config["n_embed"],
        )

    @staticmethod
    def weights(tensors: dict[str, Tensor], path: str | Path, ema: bool) -> dict[str, Tensor]:
        """Without the losses of a training checkpoint; with ``ema`` the averages that stand beside the weights.

        An average has the name of its weight with ``ema_`` before it and without the dots after the first.
        """
        weights = {name: value for name, value in tensors.items() if not name.startswith(("loss.", "ema_"))}
        if not ema:
            return weights
        names = {}
        for name in weights:
            part, _, rest = name.partition(".")
            names[name] = f"ema_{part}.{rest.replace('.', '')}"
        if absent := [average for average in names.values() if average not in tensors]:
            problem = f"it has no averaged weights: {absent[0]} is missing"
            raise DataFileError(path, problem, "Leave ema out, or pass the training checkpoint")
        return {name: tensors[average] for name, average in names.items()}

    def _norm_factory(self, architecture: Architecture) -> Callable[[int], nn.Module]:
        return functools.partial(SpatialNorm, embed_dim=architecture.embed_dim)
