"""A small language model of text alone, as the folder that ``model.pretrained`` names."""

from pathlib import Path

import torch

from megat2i.config import ModelConfig
from megat2i.model import weights


def save(folder: Path, shape: ModelConfig, rows: int) -> dict[str, torch.Tensor]:
    """Random float32 weights with ``rows`` of text; returns them by name."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(size, generator=generator) * 0.3 for name, size in weights.sizes(shape, rows).items()}
    dtypes = dict.fromkeys(tensors, torch.float32)
    weights.save(weights.ModelWeights(folder, shape, rows, dtypes, tensors.__getitem__), folder, {"from": "test"})
    return tensors
