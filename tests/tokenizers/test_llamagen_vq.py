"""LlamaGenVQ: its names and its results are those that the original printed for the same weights and image."""

import hashlib
import re

import pytest
import torch
from small_networks import random_images, random_tensor

from megat2i.files import DataFileError
from megat2i.tokenizers.llamagen_vq import LlamaGenVQ

# Printed by the original (LlamaGen at commit ce98ec4, torch 2.13 on a CPU) for the weights below.
NAMES = 344
NAMES_SHA256 = "25666a85ab873be97b7cb016ec80c2e554a56da54b872c6f2a01cc0e5a591048"  # of the sorted lines "name shape"
LATENTS = [0.1579210, 0.2856657, 0.8920733, -0.3539580, -0.0286890, -0.0564532, -0.2852830, -0.5669816]
CODES = [9547, 15875, 571, 3696, 11458, 9010, 4698, 12168, 2449, 3865, 1519, 3198]
CODES += [12624, 15875, 1086, 11622, 4509, 13719, 2422, 1856, 5697, 12704, 10974, 227]
ROW_OF_RED = [-0.1941030, -0.2317572, 0.0742564, 0.1024762, -0.4378538, -0.6626665, -0.4827309, -0.6196488]
MEAN_AND_DEVIATION = [-0.3757261, 0.4363984]


def original_name(name: str) -> str:
    """LlamaGen's name of one of our tensors."""
    name = re.sub(r"\.down\.(\d)\.", r".conv_blocks.\1.", name)
    name = re.sub(r"\.up\.(\d)\.", lambda found: f".conv_blocks.{4 - int(found[1])}.", name)
    name = re.sub(r"(conv_blocks\.\d)\.block\.", r"\1.res.", name)
    for number, part in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{part}.", f".mid.{number}.")
    return name


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        state = LlamaGenVQ(LlamaGenVQ.sizes["VQ-16"]).state_dict()
    shapes = {original_name(name): value.shape for name, value in state.items()}
    weights = {name: random_tensor(name, shape) for name, shape in shapes.items()}
    return {**weights, "quantize.codebook_used": torch.zeros(65536)}


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("llamagen") / "vq_ds16.pt"
    torch.save({"model": tensors}, path)
    return path


def test_the_names_and_shapes_are_the_originals(tensors):
    lines = sorted(f"{name} {list(value.shape)}" for name, value in tensors.items())
    assert len(lines) == NAMES and hashlib.sha256("\n".join(lines).encode()).hexdigest() == NAMES_SHA256


def faults(model: LlamaGenVQ) -> list[str]:
    images, codes = random_images(1, 64, 96), torch.tensor([CODES])
    decoded = model.decode_float(codes, (4, 6))
    found = {
        "latents": torch.allclose(model.latents(images).flatten()[:8], torch.tensor(LATENTS), atol=5e-5),
        "codes": torch.equal(model.encode(images), codes),
        "row": torch.allclose(decoded[0, 0, 5, ::12], torch.tensor(ROW_OF_RED), atol=2e-4),
        "mean": torch.allclose(
            torch.stack((decoded.mean(), decoded.std())), torch.tensor(MEAN_AND_DEVIATION), atol=1e-4
        ),
    }
    return [name for name, right in found.items() if not right]


def test_results_are_the_originals(file):
    model = LlamaGenVQ.from_checkpoint(file, "VQ-16")
    assert (model.codebook_size, model.grid, model.kind) == (16384, (16, 16), "llamagen-vq")
    assert faults(model) == []
    model.decoder.up[2].block[1].norm1.eps = 1e-3
    model._vectors = lambda latents: latents  # a codebook that is not of unit vectors
    assert faults(model) == ["codes", "row", "mean"]


def test_another_size_is_refused_by_name(file):
    with pytest.raises(DataFileError, match=r"not a llamagen-vq VQ-8 model: .*Its sizes are those of VQ-16"):
        LlamaGenVQ.from_checkpoint(file, "VQ-8")
    with pytest.raises(DataFileError, match="averaged weights are not known"):
        LlamaGenVQ.from_checkpoint(file, ema=True)
