"""Random weights for FID's Inception network, with which its features are of ordinary size."""

import torch
from torch import Tensor

from megat2i.evaluate.inception import Inception


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """A state dict under the published file's names, old enough to lack ``num_batches_tracked``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception().state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values *= (2 / shape[1:].numel()) ** 0.5
        elif name.endswith("running_var"):
            values = 0.5 + values.sigmoid()
        elif name.endswith("bn.weight"):
            values = 1 + 0.2 * values
        else:
            values *= 0.2
        weights[name] = values
    return weights
