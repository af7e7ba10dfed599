"""The objective: cross-entropy over the combined vocabulary, with every modality counted and reported apart.

Objective = sum_m w_m * nll_m / sum_m w_m * count_m, with nll_m and count_m summed over modality m in the whole global
batch. Counts are reduced first and divided by once, so the mean is exact over any number of micro-batches and ranks:
never a mean of means.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megat2i.kernels import TokenLosses
from megat2i.vocab import MODALITIES


def count_tokens(modalities: list[Tensor]) -> Tensor:
    """Positions of each modality [3] int64 in tensors of modality codes (-1: ignored)."""
    if not modalities:
        return torch.zeros(len(MODALITIES), dtype=torch.int64)
    codes = torch.cat([modality.flatten() for modality in modalities]).long()
    return torch.bincount(codes + 1, minlength=len(MODALITIES) + 1)[1:].cpu()


def sum_by_modality(values: Tensor, modality: Tensor) -> Tensor:
    """Sums [3] in float64 of per-token ``values`` [N] over each modality of ``modality`` [N] int8 (-1: nowhere)."""
    sums = torch.zeros(len(MODALITIES) + 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, modality.flatten().long() + 1, values.flatten().double())[1:]


@dataclass(frozen=True)
class ModalityLoss:
    """The weights [3] of text, image and special positions, and the coefficient of the z-loss.

    ``report``: what else the record of every step says of the objective.
    """

    weights: tuple[float, float, float]
    z_loss: float = 0.0
    report: Callable[[], dict[str, float]] = dict

    def token_weight(self, modality: Tensor, counts: Tensor) -> Tensor:
        """Weight (float32) of every position of ``modality``, given the ``counts`` [3] of the whole global batch.

        The sum over the global batch of weight * loss is the objective.
        """
        weights = torch.tensor([0.0, *self.weights], dtype=torch.float64)
        normaliser = (weights[1:] * counts.cpu()).sum()
        if normaliser == 0:
            raise ValueError(f"no position of the batch has a weight above 0: counts {counts.tolist()}, {self.weights}")
        return (weights / normaliser).float().to(modality.device)[modality.long() + 1]

    def objective(self, losses: TokenLosses, scale: float) -> Tensor:
        """This micro-batch's share of the objective, times the engine's ``scale``; a scalar with gradients."""
        return losses.loss.sum() * scale
