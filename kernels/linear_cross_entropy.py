"""The loss head: output projection and cross-entropy in one op that holds a chunk of the [N, V] logits at most.

``linear_cross_entropy`` walks over chunks of tokens. The forward pass keeps two numbers a token; the backward pass
recomputes a chunk's logits and turns them into gradients in place. That costs four matrix products instead of three,
and a chunk of logits instead of all: at N = 36,864 and V = 66,816, 0.07 GB for 4.9 GB. Where one chunk holds all tokens
its logits are kept instead of recomputed. Columns outside ``ranges`` are not computed at all, so they have exactly no
probability, and neither are tokens that are ignored.

The target's logit and the log-sum-exp of all others are kept apart: the loss is log(1 + exp(others - target)) and the
target's gradient -exp(others - lse), which keep all their digits where the target's probability is close to 1.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megat2i.kernels import reference
from megat2i.kernels.outputs import TokenLosses

CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MB in float32
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

    With a ``group`` of t > 1 ranks the vocabulary is sharded: rank r's ``weight`` [V / t, D] holds the r-th of t equal
    parts of each of ``blocks`` (start, end), in the order of ``blocks``. ``hidden`` and ``targets`` are the same on all
    ranks, and so are the results and the gradient of ``hidden``. One all-gather of 16 bytes a token.

    ``mode`` other than "exact" (with its bound ``delta``) belongs to the signature that callers rely on, but has no
    implementation yet: it raises ValueError.
    """
    if mode != "exact":
        raise ValueError(f"mode '{mode}' is not implemented; use mode='exact'")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation '{implementation}' is not one of {', '.join(IMPLEMENTATIONS)}")
    sharded = group is not None and group.size() > 1
    rows = weight.shape[0] * (group.size() if sharded else 1)
    _check(hidden, weight, targets, ranges, rows, token_weight)
    if implementation == "reference":
        if sharded:
            raise ValueError("the reference implementation knows no sharded vocabulary; use implementation='chunked'")
        return reference.linear_cross_entropy(
            hidden,
            weight,
            targets,
            ranges=ranges,
            ignore_index=ignore_index,
            z_loss=z_loss,
            token_weight=token_weight,
        )
    blocks = blocks or ((0, rows),)
    if sum(end - start for start, end in blocks) != rows:
        raise ValueError(f"blocks {blocks} must cover the {rows} rows of the vocabulary")
    pieces = _local_pieces(ranges, blocks, group.rank() if sharded else 0, rows // weight.shape[0])
    return TokenLosses(
        *_ChunkedLinearCrossEntropy.apply(
            hidden, weight, targets, token_weight, ranges, pieces, ignore_index, z_loss, group if sharded else None
        )
    )


def _check(hidden, weight, targets, ranges, rows, token_weight) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D]")
    for name, tensor in (("targets", targets), ("token_weight", token_weight)):
        if tensor is not None and tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be [N] = [{hidden.shape[0]}]")
    bounds = [bound for pair in ranges for bound in pair]
    empty = not bounds or any(start >= end for start, end in ranges)
    if empty or bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > rows:
        raise ValueError(f"ranges {ranges} must be ascending, disjoint, not empty and within the {rows} rows of weight")


class _Piece(NamedTuple):
    """Consecutive columns that this rank computes: rows ``start`` .. ``stop`` of its weight, ids from ``first`` on."""

    range: int  # number of the id range that they belong to
    start: int
    stop: int
    first: int


def _local_pieces(ranges, blocks, rank: int, ranks: int) -> tuple[_Piece, ...]:
    """The parts of ``ranges`` that lie in this rank's share of each block, in the order of the ranges."""
    pieces, local = [], 0
    for start, end in blocks:
        if (end - start) % ranks:
            raise ValueError(f"block ({start}, {end}) does not divide into {ranks} equal parts")
        share = (end - start) // ranks
        low = start + rank * share
        for number, (first, last) in enumerate(ranges):
            begin, finish = max(first, low), min(last, low + share)
            if begin < finish:
                pieces.append(_Piece(number, local + begin - low, local + finish - low, begin))
        local += share
    if not pieces:
        raise ValueError(f"rank {rank} of {ranks} holds no column of {ranges}; shard over fewer ranks")
    return tuple(sorted(pieces))


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weight, ranges, pieces, ignore_index, z_loss, group):
        live = (targets != ignore_index).nonzero().squeeze(1)
        live_hidden, live_targets = hidden[live], targets[live]
        columns = _local_columns(live_targets, pieces)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Of each token over this rank's columns: log-sum-exp without the target by range, target logit, largest other.
        statistics = hidden.new_full((len(ranges) + 2, len(live)), float("-inf"), dtype=wide)
        # The same on all ranks, whatever share of the ranges each has: every chunk's gradient is reduced over ranks.
        columns_of_rank = sum(end - start for start, end in ranges) // (group.size() if group else 1)
        ctx.chunks = chunks = _chunks(len(live), columns_of_rank)
        for rows in chunks:
            logits = _logits(live_hidden[rows], weight, pieces).to(wide)
            column = columns[rows, None]
            here, safe = column >= 0, column.clamp(min=0)
            target = logits.gather(1, safe)
            statistics[-2, rows] = target.where(here, float("-inf")).squeeze(1)
            logits.scatter_(1, safe, target.where(~here, float("-inf")))
            statistics[-1, rows] = logits.amax(dim=1)
            for piece, part in zip(pieces, _by_piece(logits, pieces), strict=True):
                of_range = statistics[piece.range, rows]
                of_range.copy_(torch.logaddexp(of_range, part.logsumexp(dim=1)))
        statistics = _over_ranks(statistics, group)
        others_by_range, target, largest = statistics[:-2], statistics[-2], statistics[-1]
        others = others_by_range.logsumexp(dim=0)
        nll = torch.logaddexp(others - target, torch.zeros_like(others))
        lse = target + nll
        own = torch.stack([(live_targets >= start) & (live_targets < end) for start, end in ranges])
        off_range_mass = (others_by_range - lse).exp().masked_fill(own, 0.0).sum(dim=0)
        nll = torch.where(own.any(dim=0), nll, torch.nan)
        live_weight = None if token_weight is None else token_weight[live]
        loss = nll + z_loss * lse.square() if z_loss else nll
        loss = loss if live_weight is None else loss * live_weight
        kept_logits = logits if len(chunks) == 1 else None
        known = own.any(dim=0)
        ctx.save_for_backward(hidden, weight, live, columns, lse, others, known, live_weight, kept_logits)
        ctx.pieces, ctx.z_loss, ctx.group = pieces, z_loss, group
        outputs = hidden.new_zeros((5, len(targets)), dtype=wide)
        correct = (target >= largest).to(wide)
        for output, values in zip(outputs, (loss, nll, lse, correct, off_range_mass), strict=True):
            output[live] = values
        loss, *rest = outputs.unbind()
        ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    def backward(ctx, grad_loss, *_unused):
        hidden, weight, live, columns, lse, others, known, live_weight, kept_logits = ctx.saved_tensors
        grad = grad_loss[live].to(lse.dtype)
        grad = (grad if live_weight is None else grad * live_weight).masked_fill(~known, 0.0)[:, None]
        slope = 2 * ctx.z_loss * lse[:, None]  # of the z-loss
        of_target = (1 - (others - lse).exp())[:, None]
        target_grad = grad * (slope * of_target - (others - lse).exp()[:, None])
        live_hidden = hidden[live]
        live_grad = torch.zeros_like(live_hidden)
        # Summed over chunks in float32: in bfloat16 the result would depend on the number of chunks.
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        reductions = []
        for rows in ctx.chunks:
            logits = kept_logits
            if logits is None:
                logits = _logits(live_hidden[rows], weight, ctx.pieces).to(lse.dtype)
            dlogits = (logits - lse[rows, None]).exp_().mul_(grad[rows] * (1 + slope[rows]))
            column = columns[rows, None]
            safe = column.clamp(min=0)
            dlogits.scatter_(1, safe, target_grad[rows].where(column >= 0, dlogits.gather(1, safe)))
            parts = _by_piece(dlogits.to(hidden.dtype), ctx.pieces)
            for piece, part in zip(ctx.pieces, parts, strict=True):
                live_grad[rows].addmm_(part, weight[piece.start : piece.stop])
            if ctx.group is not None:  # runs while the products below do
                reductions.append(dist.all_reduce(live_grad[rows], group=ctx.group, async_op=True))
            for piece, part in zip(ctx.pieces, parts, strict=True):
                grad_weight[piece.start : piece.stop] += part.T @ live_hidden[rows]
        for reduction in reductions:
            reduction.wait()
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, live, live_grad)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None, None


def _over_ranks(statistics: Tensor, group: ProcessGroup | None) -> Tensor:
    """The statistics [ranges + 2, N] over the columns of all ranks, by one all-gather."""
    if group is None:
        return statistics
    gathered = statistics.new_empty((group.size() * len(statistics), *statistics.shape[1:]))
    dist.all_gather_into_tensor(gathered, statistics, group=group)
    gathered = gathered.view(group.size(), *statistics.shape)
    by_range = gathered[:, :-2].logsumexp(dim=0)
    return torch.cat((by_range, gathered[:, -2:].amax(dim=0)))


def _chunks(tokens: int, columns: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, columns))
    return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]


def _local_columns(targets: Tensor, pieces) -> Tensor:
    """Position of every target among the columns that this rank computes; -1 where another rank has it, or none."""
    columns = torch.full_like(targets, -1)
    offset = 0
    for piece in pieces:
        size = piece.stop - piece.start
        inside = (targets >= piece.first) & (targets < piece.first + size)
        columns = torch.where(inside, targets - piece.first + offset, columns)
        offset += size
    return columns


def _logits(hidden: Tensor, weight: Tensor, pieces) -> Tensor:
    """[rows, columns of this rank] in the dtype of ``hidden``."""
    return torch.cat([hidden @ weight[piece.start : piece.stop].T for piece in pieces], dim=1)


def _by_piece(columns: Tensor, pieces) -> tuple[Tensor, ...]:
    """Views of [rows, columns of this rank], one for each piece."""
    return columns.split([piece.stop - piece.start for piece in pieces], dim=1)
