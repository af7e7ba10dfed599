"""Networks small enough for a test, with weights that are decided by their names."""

import hashlib

import numpy as np
import torch

from megat2i.tokenizers.vq_tokenizer import VQTokenizer
from megat2i.tokenizers.vqgan import Architecture

# The original's fields. Two levels (a stride of 2), attention at the lower one.
SMALL = {
    "ddconfig": {
        "double_z": False,
        "z_channels": 4,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "dropout": 0.0,
    },
    "n_embed": 48,
    "embed_dim": 4,
}


def small(**changes) -> dict:
    """``SMALL`` with other values; fields of ``ddconfig`` by their own names."""
    inner = {name: value for name, value in changes.items() if name in SMALL["ddconfig"]}
    outer = {name: value for name, value in changes.items() if name not in SMALL["ddconfig"]}
    return {**SMALL, "ddconfig": {**SMALL["ddconfig"], **inner}, **outer}


def random_weights(kind: type[VQTokenizer], architecture: Architecture, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A state dict of ``random_tensor``s."""
    with torch.device("meta"):
        state = kind(architecture, architecture.stride).state_dict()
    return {name: random_tensor(name, value.shape, scale) for name, value in state.items()}


def random_tensor(name: str, shape: torch.Size, scale: float = 1.0) -> torch.Tensor:
    """float32 weights that are decided by ``name``, of a size that keeps activations near one."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    noise = scale * torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(shape), np.float32))
    if name.endswith("embedding.weight"):
        return noise
    if len(shape) == 4:
        return noise / shape[1:].numel() ** 0.5
    return 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)


def random_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch, 3, height, width), dtype=np.uint8))
