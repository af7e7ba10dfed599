"""Protocols: what is done to an image before the feature net, under the name of the tool that does it so.

FID changes by whole points with crop, resize filter and rounding, so a number without its protocol means little. These
were read in the tools' sources: pytorch-fid 0.3.0, torch-fidelity 0.4.0, clean-fid 0.1.35, GigaGAN's evaluation.py and
text2image-benchmark. What is ours: EXIF orientation is obeyed, and transparency becomes white.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from megat2i.config import ConfigError
from megat2i.evaluate.small_net import SIZE

INCEPTION_SIZE = 299
COCO_IMAGES = 30_000  # that a protocol coco30k/... generates


@dataclass(frozen=True)
class Protocol:
    """The way of an image, an RGB picture of any size, to the feature net."""

    feature_net: str  # inception | small
    crop: str  # none | center, an odd surplus cut at its floor | center, an odd surplus cut at the even pixel
    lanczos_to: int | None  # Pillow's Lanczos to a square of so many pixels, rounded to uint8
    resize: str  # filter, library and result of the resize to what the net takes
    zero: float  # pixels become (pixel - zero) / zero

    @property
    def size(self) -> int:
        return SIZE if self.feature_net == "small" else INCEPTION_SIZE


FLOOR, EVEN = "center, odd surplus at its floor", "center, odd surplus at the even pixel"
BICUBIC, BICUBIC_FLOAT = "bicubic, Pillow, uint8", "bicubic, Pillow, float32 by channel"  # both antialiased
BILINEAR, TENSORFLOW = "bilinear without antialiasing, PyTorch, float32", "bilinear as in TensorFlow 1, float32"
PROTOCOLS = {
    "coco30k/gigagan": Protocol("inception", EVEN, 256, BICUBIC_FLOAT, 128),
    "coco30k/t2ibench": Protocol("inception", FLOOR, None, BICUBIC, 127.5),
    "pytorch-fid": Protocol("inception", "none", None, BILINEAR, 127.5),
    "torch-fidelity": Protocol("inception", "none", None, TENSORFLOW, 128),
    "clean-fid": Protocol("inception", "none", None, BICUBIC_FLOAT, 128),
    "nano": Protocol("small", "none", None, BICUBIC, 127.5),
}


def find_protocol(name: str) -> Protocol:
    """The protocol ``name``. Raises ConfigError."""
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name!r} is none of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def prepare(image: Image.Image, protocol: Protocol) -> Tensor:
    """What the feature net takes for an RGB ``image``: float32 [3, size, size]."""
    if protocol.crop != "none":
        image = _center(image, even=protocol.crop == EVEN)
    if protocol.lanczos_to:
        image = image.resize((protocol.lanczos_to, protocol.lanczos_to), Image.Resampling.LANCZOS)
    return (_resized(image, protocol.resize, protocol.size) - protocol.zero) / protocol.zero


def _center(image: Image.Image, even: bool) -> Image.Image:
    side = min(image.size)
    left, top = (round((length - side) / 2) if even else (length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, how: str, size: int) -> Tensor:
    """``image`` as float32 [3, size, size] in 0 .. 255."""
    square, bicubic = (size, size), Image.Resampling.BICUBIC
    if how == BICUBIC_FLOAT:
        channels = [np.asarray(channel.convert("F").resize(square, bicubic)) for channel in image.split()]
        return torch.from_numpy(np.stack(channels)).clamp(0, 255)
    image = image.resize(square, bicubic) if how == BICUBIC else image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    if how == BILINEAR:
        return F.interpolate(pixels[None], square, mode="bilinear", align_corners=False)[0]
    return _like_tensorflow(pixels, size) if how == TENSORFLOW else pixels


def _like_tensorflow(pixels: Tensor, size: int) -> Tensor:
    """[3, H, W] to [3, size, size] with the left upper corners of pixels, not their centres, laid over each other."""
    for dim in (2, 1):
        length = pixels.shape[dim]
        position = torch.arange(size) * torch.tensor(length / size)
        low = position.long()
        share = (position - low).unsqueeze(0) if dim == 2 else (position - low).unsqueeze(1)
        near, far = pixels.index_select(dim, low), pixels.index_select(dim, (low + 1).clamp(max=length - 1))
        pixels = near + (far - near) * share
    return pixels
