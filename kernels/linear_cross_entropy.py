"""The loss head: output projection and cross-entropy in one op that never holds the [N, V] logits.

``linear_cross_entropy`` walks over chunks of tokens. The forward pass keeps one number a token (log-sum-exp); the
backward pass recomputes a chunk's logits and turns them into gradients in place. That costs four matrix products
instead of three, and a chunk of logits instead of all: at N = 36,864 and V = 66,816, 0.03 GB for 4.9 GB. Where one
chunk holds all tokens its logits are kept instead of recomputed. Columns outside ``ranges`` are not computed at all, so
they have exactly no probability, and neither are tokens that are ignored.
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
    empty = not bounds or any(start >= end for start, end in ranges)
    if empty or bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > weight.shape[0]:
        rows = weight.shape[0]
        raise ValueError(f"ranges {ranges} must be ascending, disjoint, not empty and within the {rows} rows of weight")


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weight, ranges, ignore_index, z_loss):
        live = (targets != ignore_index).nonzero().squeeze(1)
        live_hidden, columns = hidden[live], _live_columns(targets[live], ranges)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        lse, nll, correct, off_range_mass = hidden.new_empty((4, len(live)), dtype=wide)
        chunks = _chunks(len(live), ranges)
        for rows in chunks:
            logits = _logits(live_hidden[rows], weight, ranges).to(wide)
            column = columns[rows]
            range_lse = torch.stack([part.logsumexp(dim=-1) for part in _by_range(logits, ranges)])  # [ranges, rows]
            lse[rows] = range_lse.logsumexp(dim=0)
            nll[rows] = lse[rows] - logits.gather(1, column.clamp(min=0)[:, None]).squeeze(1)
            correct[rows] = (logits.argmax(dim=-1) == column).to(wide)
            own = torch.stack(_own_range(column, ranges))
            off_range_mass[rows] = (range_lse - lse[rows]).exp().masked_fill(own, 0.0).sum(dim=0)
        nll = torch.where(columns == _OUT_OF_RANGE, torch.nan, nll)
        live_weight = None if token_weight is None else token_weight[live]
        loss = nll + z_loss * lse.square() if z_loss else nll
        loss = loss if live_weight is None else loss * live_weight
        ctx.save_for_backward(hidden, weight, live, columns, lse, live_weight, logits if len(chunks) == 1 else None)
        ctx.ranges, ctx.z_loss = ranges, z_loss
        outputs = hidden.new_zeros((5, len(targets)), dtype=wide)
        for output, values in zip(outputs, (loss, nll, lse, correct, off_range_mass), strict=True):
            output[live] = values
        loss, *others = outputs.unbind()
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_unused):
        hidden, weight, live, columns, lse, live_weight, kept_logits = ctx.saved_tensors
        grad = grad_loss[live].to(lse.dtype).masked_fill(columns == _OUT_OF_RANGE, 0.0)
        grad = (grad if live_weight is None else grad * live_weight)[:, None]
        live_hidden = hidden[live]
        live_grad = torch.zeros_like(live_hidden)
        # Summed over chunks in float32: in bfloat16 the result would depend on the number of chunks.
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        for rows in _chunks(len(live), ctx.ranges):
            logits = kept_logits
            if logits is None:
                logits = _logits(live_hidden[rows], weight, ctx.ranges).to(lse.dtype)
            dlogits = _dlogits(logits, columns[rows].clamp(min=0)[:, None], lse[rows, None], grad[rows], ctx.z_loss)
            parts = _by_range(dlogits.to(hidden.dtype), ctx.ranges)
            for (start, end), part in zip(ctx.ranges, parts, strict=True):
                live_grad[rows].addmm_(part, weight[start:end])
                grad_weight[start:end] += part.T @ live_hidden[rows]
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, live, live_grad)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


_OUT_OF_RANGE = -1


def _dlogits(logits: Tensor, target: Tensor, lse: Tensor, grad: Tensor, z_loss: float) -> Tensor:
    """Gradient of the loss by the logits [rows, live columns], given that by the loss; target, lse, grad [rows, 1].

    The target's entry is p - 1: where p is close to 1 that difference keeps few digits, minus the sum of all other
    probabilities keeps all of them.
    """
    probabilities = (logits - lse).exp_()
    of_target = probabilities.gather(1, target)
    others = probabilities.scatter_(1, target, 0.0).sum(dim=1, keepdim=True)
    slope = 2 * z_loss * lse  # of the z-loss
    return probabilities.mul_(grad * (1 + slope)).scatter_(1, target, grad * (slope * of_target - others))


def _chunks(tokens: int, ranges) -> list[slice]:
    columns = sum(end - start for start, end in ranges)
    size = max(1, CHUNK_ELEMENTS // columns)
    return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]


def _live_columns(targets: Tensor, ranges) -> Tensor:
    """Position of every target among the columns that are computed."""
    columns = torch.full_like(targets, _OUT_OF_RANGE)
    offset = 0
    for start, end in ranges:
        inside = (targets >= start) & (targets < end)
        columns = torch.where(inside, targets - start + offset, columns)
        offset += end - start
    return columns


def _logits(hidden: Tensor, weight: Tensor, ranges) -> Tensor:
    """[rows, live columns] in the dtype of ``hidden``."""
    return torch.cat([hidden @ weight[start:end].T for start, end in ranges], dim=1)


def _by_range(columns: Tensor, ranges) -> tuple[Tensor, ...]:
    """Views of [rows, live columns], one for each range."""
    return columns.split([end - start for start, end in ranges], dim=1)


def _own_range(column: Tensor, ranges) -> list[Tensor]:
    """Per range, whether it holds each target."""
    bounds, stop = [], 0
    for start, end in ranges:
        bounds.append((stop, stop := stop + end - start))
    return [(column >= first) & (column < stop) for first, stop in bounds]
