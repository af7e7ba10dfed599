"""What the loss head returns: one number per token for each quantity."""

from typing import NamedTuple

from torch import Tensor


class TokenLosses(NamedTuple):
    """Per-token results [N] of ``linear_cross_entropy``, float32 (float64 for float64 inputs), 0 where ignored."""

    loss: Tensor  # token_weight * (nll + z_loss * lse^2); the only field that carries gradients
    nll: Tensor  # negative log-likelihood of the target, nats
    lse: Tensor  # log of the sum of exponentials of the logits
    correct: Tensor  # 1 where no logit is larger than the target's
    off_range_mass: Tensor  # probability given to ids of other modalities than the target's
