"""Protocols: each resize against another implementation of it, crops by hand, and no two protocols the same."""

import itertools

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from megat2i.config import ConfigError
from megat2i.data.images import to_tensor
from megat2i.evaluate.protocol import EVEN, FLOOR, PROTOCOLS, Protocol, find_protocol, prepare


def pixels(image: Image.Image) -> torch.Tensor:
    return to_tensor(image)[None].float()


@pytest.mark.parametrize("size", [(53, 40), (256, 256), (400, 640)], ids=str)
def test_torch_fidelitys_resize(torch_fidelity, photo, size):
    image = photo.resize(size)
    expected = torch_fidelity.resize(pixels(image), size=(299, 299), align_corners=False)
    assert torch.equal(prepare(image, PROTOCOLS["torch-fidelity"]), ((expected - 128) / 128)[0])


def test_pytorch_fids_resize(photo):
    expected = 2 * F.interpolate(pixels(photo) / 255, size=(299, 299), mode="bilinear", align_corners=False)[0] - 1
    assert torch.allclose(prepare(photo, PROTOCOLS["pytorch-fid"]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(53, 40), (640, 480)], ids=["up", "down"])
def test_clean_fids_resize(photo, size):
    """Bicubic with antialiasing, not rounded; PyTorch has one of its own."""
    image = photo.resize(size)
    expected = F.interpolate(pixels(image), size=(299, 299), mode="bicubic", antialias=True, align_corners=False)
    found = prepare(image, PROTOCOLS["clean-fid"]) * 128 + 128
    assert torch.allclose(found, expected[0].clamp(0, 255), rtol=0, atol=2e-3)
    assert (found - found.round()).abs().max() > 0.4
    rounded = prepare(image, PROTOCOLS["coco30k/t2ibench"]) * 127.5 + 127.5
    assert torch.allclose(rounded, rounded.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("crop", "size", "box"),
    [
        (FLOOR, (10, 7), (1, 0, 8, 7)),  # a surplus of 3: 1.5 pixels on either side
        (EVEN, (10, 7), (2, 0, 9, 7)),
        (FLOOR, (8, 7), (0, 0, 7, 7)),
        (EVEN, (8, 7), (0, 0, 7, 7)),
        (EVEN, (7, 12), (0, 2, 7, 9)),
    ],
)
def test_crops(photo, crop, size, box):
    image = photo.crop((0, 0, *size))
    whole = Protocol("inception", "none", None, PROTOCOLS["pytorch-fid"].resize, 127.5)
    cut = Protocol("inception", crop, None, whole.resize, 127.5)
    assert torch.equal(prepare(image, cut), prepare(image.crop(box), whole))


def test_gigagans_way(photo):
    """The square, Lanczos to 256 and rounded, then as clean-fid."""
    image = photo.resize((500, 300))
    square = image.crop((100, 0, 400, 300)).resize((256, 256), Image.Resampling.LANCZOS)
    assert torch.equal(prepare(image, PROTOCOLS["coco30k/gigagan"]), prepare(square, PROTOCOLS["clean-fid"]))


def test_protocols_differ(photo):
    image = photo.resize((280, 211))
    prepared = {name: prepare(image, protocol) for name, protocol in PROTOCOLS.items()}
    assert prepared.pop("nano").shape == (3, 64, 64)
    assert all(found.shape == (3, 299, 299) and found.dtype == torch.float32 for found in prepared.values())
    assert all(-1.01 < found.min() < -0.9 and 0.9 < found.max() < 1.01 for found in prepared.values())
    for one, other in itertools.combinations(prepared, 2):
        assert (prepared[one] - prepared[other]).abs().mean() > 1e-3, (one, other)


def test_an_unknown_one_is_refused():
    with pytest.raises(ConfigError, match="coco30k/gigagan"):
        find_protocol("coco")
