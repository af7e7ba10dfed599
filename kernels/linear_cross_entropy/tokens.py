"""From a token's statistics over the vocabulary to its loss and the coefficients of its gradient: O(N) arithmetic."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megat2i.kernels.linear_cross_entropy.columns import Piece, Ranges

ROW_TILE = 128  # rows that mode "certified" treats as one: a row tile of the kernels
FAR = 60.0  # nats: a factor of exp(-60) of the gradient still fits bfloat16's exponents, with room for the weights


@dataclass(frozen=True)
class Settings:
    """What one call asks for; ``pieces`` are this rank's columns."""

    ranges: Ranges
    pieces: tuple[Piece, ...]
    mode: str
    delta: float
    z_loss: float
    group: ProcessGroup | None
    hidden_gradient: bool
    weight_gradient: bool


class TokenValues(NamedTuple):
    """Results and gradient coefficients of n tokens."""

    outputs: Tensor  # [6, n]: the fields of TokenLosses; 0 where ignored
    lse: Tensor  # [n] finite everywhere
    slope: Tensor  # [n] derivative of z_loss * lse^2
    of_target: Tensor  # [n] gradient of the unweighted loss to the target's logit
    upstream: Tensor  # [n] weight of the token; 0 where there is no gradient
    keep: Tensor | None  # [row tiles, ranges] bool: which blocks of the gradient products to compute; None: all


def token_values(
    statistics: Tensor, own: Tensor, live: Tensor, token_weight: Tensor | None, settings: Settings
) -> TokenValues:
    """``statistics`` [ranges + 2, n] over all ranks (see ``over_ranks``); own [ranges, n]: is the target in the range.

    The target's logit and the log-sum-exp of all others come apart: the loss is log(1 + exp(others - target)) and the
    target's gradient -exp(others - lse), which keep all their digits where the target's probability is close to 1.
    """
    known = own.any(dim=0)
    by_range = statistics[:-2]
    if settings.mode == "masked":
        by_range = by_range.masked_fill(~own, float("-inf"))
    others = by_range.logsumexp(dim=0)
    target, largest = (values.masked_fill(~known, 0.0) for values in (statistics[-2], statistics[-1]))
    gap = others - target
    nll = torch.logaddexp(gap, torch.zeros_like(gap))
    lse = torch.where(known, target + nll, others.masked_fill(~live, 0.0))
    rest = (gap - nll).exp()  # probability of all others
    by_range = (by_range - lse).exp().masked_fill(own, 0.0)
    off_range_mass = by_range.sum(dim=0)
    slope = 2 * settings.z_loss * lse
    loss = nll + settings.z_loss * lse.square() if settings.z_loss else nll
    size = (1 + slope).abs()
    if token_weight is not None:
        loss, size = loss * token_weight, size * token_weight.abs()
    keep, skipped = None, torch.zeros_like(loss)
    if settings.mode != "exact":
        needed = own & live
        if settings.mode == "certified":
            needed = needed | (live & ~(off_range_mass <= settings.delta))
        keep = _any_in_tile(needed)
        of_token = keep.T.repeat_interleave(ROW_TILE, dim=1)[:, : len(loss)]
        if settings.mode == "certified":
            skipped = by_range.masked_fill(of_token, 0.0).sum(dim=0) * size
    nothing_known = live & ~known
    loss, nll = (values.masked_fill(nothing_known, float("nan")) for values in (loss, nll))
    correct = (target >= largest).to(loss.dtype)
    outputs = torch.stack((loss, nll, lse, correct, off_range_mass, skipped)).masked_fill(~live, 0.0)
    upstream = torch.ones_like(lse) if token_weight is None else token_weight.to(lse.dtype)
    upstream = upstream.masked_fill(~(live & known), 0.0)
    return TokenValues(outputs, lse, slope, slope * (1 - rest) - rest, upstream, keep)


def _any_in_tile(rows: Tensor) -> Tensor:
    """[row tiles, ranges] from [ranges, n]: whether any row of the tile is set."""
    padding = -rows.shape[1] % ROW_TILE
    return torch.nn.functional.pad(rows, (0, padding)).unflatten(1, (-1, ROW_TILE)).any(dim=2).T


def scaled(values: TokenValues, offset: Tensor) -> tuple[Tensor, Tensor]:
    """How rows of E = exp(logits - offset) become rows of the gradient to the logits: (factor [n], entry [n]).

    The gradient is diag(factor) E with ``entry`` in E's column of the target; the token's weight is in ``factor``.
    The exponents are cut at FAR, where E's other entries are below exp(-19) of the target's, whatever they are; and
    1 + slope is kept off 0, so that the target's entry is finite (only with z_loss of the size of 1 / lse).
    """
    rise = 1 + values.slope
    tiny = torch.finfo(rise.dtype).eps
    rise = torch.where(rise.abs() < tiny, torch.full_like(rise, tiny).copysign(rise), rise)
    distance = (values.lse - offset).clamp(-FAR, FAR)
    return values.upstream * rise * (-distance).exp(), values.of_target / rise * distance.exp()
