"""The convolutional encoder and decoder that the tokenizers of the VQGAN family share (Esser et al. 2021, section 3).

Parameters are named as in that family's checkpoints. The decoder's norms may look at a second input, the guide: that
is how MoVQ (Zheng et al. 2022) differs. Legend: B images of H x W pixels, h x w codes, C channels, d numbers a code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


@dataclass(frozen=True)
class Architecture:
    """Sizes of encoder, quantiser and decoder. Level 0 has the resolution of the image, each next one half of it."""

    channels: int
    multipliers: tuple[int, ...]  # of ``channels``, by level
    blocks: int  # residual blocks of an encoder level; a decoder level has one more
    attention: tuple[int, ...]  # levels with attention
    z_channels: int  # between encoder and quantiser
    embed_dim: int  # d
    codes: int

    def __post_init__(self):
        for name in ("channels", "blocks", "z_channels", "embed_dim", "codes"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a whole number of at least 1")
        if not self.multipliers or not all(type(value) is int and value > 0 for value in self.multipliers):
            raise ValueError(f"multipliers are {self.multipliers}, expected whole numbers of at least 1")
        if self.channels % GROUPS:
            raise ValueError(f"{self.channels} channels are not a multiple of {GROUPS}, the groups of the norms")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def stride(self) -> int:
        """Pixels per code along a side."""
        return 2 ** (len(self.multipliers) - 1)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Architecture":
        """The architecture of a checkpoint's tensors. KeyError names a missing one, ValueError says what is odd."""
        channels = tensors["encoder.conv_in.weight"].shape[0]
        levels = _count(tensors, "encoder.down.{}.block.0.conv1.weight")
        widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
        codes, embed_dim = tensors["quantize.embedding.weight"].shape
        return cls(
            channels=channels,
            multipliers=tuple(width // max(1, channels) for width in widths),
            blocks=_count(tensors, "encoder.down.0.block.{}.conv1.weight"),
            attention=tuple(level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in tensors),
            z_channels=tensors["encoder.conv_out.weight"].shape[0],
            embed_dim=embed_dim,
            codes=codes,
        )


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    count = 0
    while name.format(count) in tensors:
        count += 1
    return count


class Norm(nn.GroupNorm):
    """Group norm; the guide is not used."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels, eps=1e-6)

    def forward(self, x: Tensor, guide: Tensor | None) -> Tensor:
        return super().forward(x)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, each after norm and swish, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, guide: Tensor | None) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x, guide), inplace=True))
        inner = self.conv2(F.silu(self.norm2(inner, guide), inplace=True))
        return inner.add_(self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, one head, beside a shortcut."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, guide: Tensor | None) -> Tensor:
        normed = self.norm(x, guide)
        # [B, 1 head, h * w, C]; the default scale is C ** -0.5
        q, k, v = (conv(normed).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(outputs if i else inputs, outputs, norm) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs, norm) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor, guide: Tensor | None) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x, guide)
            if self.attn:
                x = self.attn[number](x, guide)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, norm)
        self.attn_1 = AttentionBlock(channels, norm)
        self.block_2 = ResidualBlock(channels, channels, norm)

    def forward(self, x: Tensor, guide: Tensor | None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, guide), guide), guide)


class Downsample(nn.Module):
    """Half the resolution. The zeros are added at the right and the bottom alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3 x 3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """Images float [B, 3, H, W] in -1..1 to float [B, z_channels, H / stride, W / stride]."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        widths, last = architecture.widths, len(architecture.widths) - 1
        self.conv_in = nn.Conv2d(3, architecture.channels, 3, padding=1)
        self.down = nn.ModuleList()
        inputs = architecture.channels
        for number, width in enumerate(widths):
            level = Level(inputs, width, architecture.blocks, number in architecture.attention, Norm)
            level.downsample = Downsample(width) if number < last else nn.Identity()
            self.down.append(level)
            inputs = width
        self.mid = Middle(inputs, Norm)
        self.norm_out, self.conv_out = Norm(inputs), nn.Conv2d(inputs, architecture.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level.downsample(level(x, None))
        return self.conv_out(F.silu(self.norm_out(self.mid(x, None), None)))


class Decoder(nn.Module):
    """float [B, z_channels, h, w] and the guide [B, d, h, w] to images float [B, 3, h * stride, w * stride]."""

    def __init__(self, architecture: Architecture, norm: Callable[[int], nn.Module]):
        super().__init__()
        widths, inputs = architecture.widths, architecture.widths[-1]
        self.conv_in = nn.Conv2d(architecture.z_channels, inputs, 3, padding=1)
        self.mid = Middle(inputs, norm)
        levels = []
        for number in reversed(range(len(widths))):
            level = Level(inputs, widths[number], architecture.blocks + 1, number in architecture.attention, norm)
            level.upsample = Upsample(widths[number]) if number else nn.Identity()
            levels.append(level)
            inputs = widths[number]
        self.up = nn.ModuleList(reversed(levels))  # by level, run from the last to the first
        self.norm_out, self.conv_out = norm(inputs), nn.Conv2d(inputs, 3, 3, padding=1)

    def forward(self, z: Tensor, guide: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z), guide)
        for level in reversed(self.up):
            x = level.upsample(level(x, guide))
        return self.conv_out(F.silu(self.norm_out(x, guide)))
