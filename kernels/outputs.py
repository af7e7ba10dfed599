"""What the loss head returns, one number per token for each quantity, and what it may be told about live tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLosses(NamedTuple):
    """Per-token results [N] of ``linear_cross_entropy``, float32 (float64 for float64 inputs), 0 where ignored."""

    loss: Tensor  # token_weight * (nll + z_loss * lse^2); the only field that carries gradients
    nll: Tensor  # negative log-likelihood of the target, nats
    lse: Tensor  # log of the sum of exponentials of the logits
    correct: Tensor  # 1 where no logit is larger than the target's
    off_range_mass: Tensor  # probability given to ids of other modalities than the target's
    skipped: Tensor | None = None  # l1 norm of the gradient to the logits that mode "certified" left out


@dataclass(frozen=True)
class LiveTokens:
    """Where the tokens with a target stand, known to the data loader: a bucket of fixed capacity and so fixed shapes.

    order [capacity] int64 on the device: the positions of the live tokens, best grouped by modality, then -1; count:
    how many they are, on the host. The head computes ``capacity`` rows instead of N, without asking the device.
    """

    order: Tensor
    count: int

    @staticmethod
    def collect(modality: Tensor, capacity: int) -> "LiveTokens | None":
        """From the modality code of every position [N] on the host (-1: ignored); None where they overflow the bucket.

        None means that the head computes all N rows: nothing is lost but time.
        """
        modality = modality.flatten()
        count = int((modality >= 0).sum())
        if count > capacity:
            return None
        order = torch.full((capacity,), -1, dtype=torch.int64)
        live = modality >= 0
        order[:count] = torch.argsort(torch.where(live, modality, modality.max() + 1).long(), stable=True)[:count]
        return LiveTokens(order, count)

    def to(self, device: torch.device) -> "LiveTokens":
        """The same bucket on ``device``."""
        return LiveTokens(self.order.to(device, non_blocking=True), self.count)


class GradientBound(NamedTuple):
    """Certified bounds on what mode "certified" left out of the gradients, for an upstream gradient of 1."""

    hidden: Tensor  # [N] on the 2-norm of each token's difference
    weight: Tensor  # scalar, on the sum over rows of the 2-norms of their differences (hence on the Frobenius norm)


def gradient_bound(losses: TokenLosses, hidden: Tensor, weight: Tensor) -> GradientBound:
    """The bound that ``losses`` of mode "certified" carry; skipped entries have one sign: their l1 norm is their sum.

    ‖Δ dhidden_i‖ <= skipped_i * max_v ‖weight_v‖ and sum_v ‖Δ dweight_v‖ <= sum_i skipped_i * ‖hidden_i‖. With a
    sharded vocabulary ``weight`` is this rank's share: take the largest bound over the ranks.
    """
    kind = losses.skipped.dtype
    largest_row = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=kind).amax()
    lengths = torch.linalg.vector_norm(hidden.detach(), dim=1, dtype=kind)
    return GradientBound(losses.skipped * largest_row, (losses.skipped * lengths).sum())
