"""The loss head: output projection and cross-entropy in one op that never holds the [N, V] logits.

``linear_cross_entropy`` walks over chunks of tokens. The forward pass keeps two numbers a token (log-sum-exp and target
logit); the backward pass recomputes a chunk's logits and turns them into gradients in place. That costs four matrix
products instead of three, and a chunk of logits instead of all of them: at N = 36,864 and V = 66,816 in bfloat16 it is
0.07 GB for 4.9 GB. Columns outside ``ranges`` are not computed at all, so they have exactly no probability.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megat2i.kernels import reference
from megat2i.kernels.outputs import TokenLosses

CHUNK_ELEMENTS = 1 << 23  # logits held at a time: 32 MB in float32
IMPLEMENTATIONS = ("reference", "chunked")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ranges: tuple[tuple[int, int], ...],
    blocks: tuple[tuple[int, int], ...] | None = None,
    mode: str = "exact",
    delta: float = 1e-3,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    group: ProcessGroup | None = None,
    implementation: str | None = None,
) -> TokenLosses:
    """Cross-entropy over the combined vocabulary, per token.

    hidden [N, D] and weight [V, D] of one floating dtype; targets [N] int64 unified ids, ``ignore_index`` where a token
    takes no part; ranges: the (start, end) id ranges of the modalities, ascending and disjoint, the only columns that
    receive probability; token_weight [N] float32 multiplies the loss of each token. ``implementation`` forces
    "reference" or "chunked" (default: chunked). Raises ValueError for shapes that do not fit together; a target outside
    ``ranges`` gives a NaN loss for its token.

    ``mode`` other than "exact" (with its bound ``delta``) and a vocabulary sharded over ``group`` (in stripes of
    ``blocks``) belong to the signature that callers rely on, but have no implementation yet: they raise ValueError.
    """
    _check(hidden, weight, targets, ranges, token_weight)
    if mode != "exact":
        raise ValueError(f"mode '{mode}' is not implemented; use mode='exact'")
    if blocks is not None or group is not None:
        raise ValueError("a sharded vocabulary is not implemented; call with blocks=None and group=None")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation '{implementation}' is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "reference":
        return reference.linear_cross_entropy(
            hidden,
            weight,
            targets,
            ranges=ranges,
            ignore_index=ignore_index,
            z_loss=z_loss,
            token_weight=token_weight,
        )
    return TokenLosses(
        *_ChunkedLinearCrossEntropy.apply(hidden, weight, targets, token_weight, ranges, ignore_index, z_loss)
    )


def _check(hidden, weight, targets, ranges, token_weight) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D]")
    for name, tensor in (("targets", targets), ("token_weight", token_weight)):
        if tensor is not None and tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be [N] = [{hidden.shape[0]}]")
    bounds = [bound for pair in ranges for bound in pair]
    if not bounds or bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > weight.shape[0]:
        raise ValueError(f"ranges {ranges} must be ascending, disjoint and within the {weight.shape[0]} rows of weight")


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weight, ranges, ignore_index, z_loss):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tokens = hidden.shape[0]
        columns = _live_columns(targets, ranges, ignore_index)
        lse, nll, correct, off_range_mass = (torch.zeros(tokens, dtype=wide, device=hidden.device) for _ in range(4))
        for rows in _chunks(tokens, ranges):
            logits = _logits(hidden[rows], weight, ranges).to(wide)
            column = columns[rows]
            lse[rows] = logits.logsumexp(dim=-1)
            nll[rows] = lse[rows] - logits.gather(1, column.clamp(min=0)[:, None]).squeeze(1)
            correct[rows] = (logits.argmax(dim=-1) == column).to(wide)
            off_range_mass[rows] = _off_range_mass(logits, lse[rows], column, ranges)
        live = columns != _IGNORED
        nll = torch.where(columns == _OUT_OF_RANGE, torch.nan, nll)
        for values in (lse, nll, correct, off_range_mass):
            values.masked_fill_(~live, 0.0)
        loss = nll + z_loss * lse.square() if z_loss else nll.clone()
        if token_weight is not None:
            loss = loss * token_weight
        ctx.save_for_backward(hidden, weight, columns, lse, token_weight)
        ctx.ranges, ctx.z_loss = ranges, z_loss
        ctx.mark_non_differentiable(nll, lse, correct, off_range_mass)
        return loss, nll, lse, correct, off_range_mass

    @staticmethod
    def backward(ctx, grad_loss, *_unused):
        hidden, weight, columns, lse, token_weight = ctx.saved_tensors
        grad = grad_loss if token_weight is None else grad_loss * token_weight
        grad = grad.to(lse.dtype).masked_fill(columns < 0, 0.0)
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in float32: in bfloat16 the result would depend on the number of chunks.
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        for rows in _chunks(hidden.shape[0], ctx.ranges):
            chunk_grad = grad[rows, None]
            logits = _logits(hidden[rows], weight, ctx.ranges).to(lse.dtype)
            dlogits = logits.sub_(lse[rows, None]).exp_().mul_(chunk_grad * (1 + 2 * ctx.z_loss * lse[rows, None]))
            # The target's entry is a difference of near-equal numbers where p is close to 1: taken before rounding.
            dlogits.scatter_add_(1, columns[rows].clamp(min=0)[:, None], -chunk_grad)
            dlogits = dlogits.to(hidden.dtype)
            grad_hidden[rows] = 0
            offset = 0
            for start, end in ctx.ranges:
                part = dlogits[:, offset : offset + end - start]
                grad_hidden[rows].addmm_(part, weight[start:end])
                grad_weight[start:end] += part.T @ hidden[rows]
                offset += end - start
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


_IGNORED, _OUT_OF_RANGE = -1, -2


def _chunks(tokens: int, ranges) -> list[slice]:
    columns = sum(end - start for start, end in ranges)
    size = max(1, CHUNK_ELEMENTS // columns)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _live_columns(targets: Tensor, ranges, ignore_index: int) -> Tensor:
    """Position of every target among the columns that are computed."""
    columns = torch.full_like(targets, _OUT_OF_RANGE)
    offset = 0
    for start, end in ranges:
        inside = (targets >= start) & (targets < end)
        columns = torch.where(inside, targets - start + offset, columns)
        offset += end - start
    return columns.masked_fill(targets == ignore_index, _IGNORED)


def _logits(hidden: Tensor, weight: Tensor, ranges) -> Tensor:
    """[rows, live columns] in the dtype of ``hidden``."""
    parts = [hidden @ weight[start:end].T for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _off_range_mass(logits: Tensor, lse: Tensor, column: Tensor, ranges) -> Tensor:
    mass = torch.zeros_like(lse)
    offset = 0
    for start, end in ranges:
        stop = offset + end - start
        outside = (column < offset) | (column >= stop)
        range_mass = (logits[:, offset:stop].logsumexp(dim=-1) - lse).exp()
        mass += torch.where(outside, range_mass, 0.0)
        offset = stop
    return mass
