"""Networks small enough for a test, with weights that are decided by their names."""

import hashlib

import torch

from megat2i.tokenizers.vq_tokenizer import VQTokenizer

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


def random_weights(kind: type[VQTokenizer], architecture, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A state dict: every tensor from a generator seeded by its name, of a size that keeps activations near one."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in kind(architecture, architecture.stride).state_dict().items()}
    tensors = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if name == "quantize.embedding.weight":
            tensors[name] = scale * noise
        elif name.endswith("weight") and len(shape) == 4:
            tensors[name] = scale * noise / shape[1:].numel() ** 0.5
        else:
            tensors[name] = 0.1 * scale * noise + (1.0 if name.endswith("weight") else 0.0)
    return tensors


def random_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)
