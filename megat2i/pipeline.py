"""Runs the micro-batches of a step through the model: forward and backward, gradients left on the parameters."""

import torch
from torch import Tensor

from megat2i.data.batches import Batch
from megat2i.loss import ModalityLoss, sum_by_modality
from megat2i.model.gpt import GPT


def run_schedule(model: GPT, batches: list[Batch], loss: ModalityLoss, counts: Tensor, scale: float) -> Tensor:
    """Forward and backward over ``batches``; returns sums by modality [3, 3]: nll, correct predictions, off-range mass.

    ``counts`` [3]: positions of each modality in the global batch; ``scale``: the engine's factor on the objective.
    """
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for batch in batches:
        token_weight = loss.token_weight(batch.modality, counts)
        losses = model(batch.tokens, batch.labels, token_weight, loss.z_loss)
        loss.objective(losses, scale).backward()
        sums += _sums(losses, batch)
    return sums


@torch.no_grad()
def run_forward(model: GPT, batches: list[Batch]) -> Tensor:
    """Forward only; returns the same sums [3, 3]."""
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for batch in batches:
        sums += _sums(model(batch.tokens, batch.labels), batch)
    return sums


def _sums(losses, batch: Batch) -> Tensor:
    fields = (losses.nll, losses.correct, losses.off_range_mass)
    return torch.stack([sum_by_modality(values, batch.modality) for values in fields]).cpu()
