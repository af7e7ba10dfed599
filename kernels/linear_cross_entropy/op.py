"""The head as a PyTorch custom op: the walk over chunks of tokens, and its derivative.

The forward pass makes the gradients for an upstream gradient of 1 while a chunk's exponentials are at hand, three
matrix products in all, and the backward pass multiplies them by the upstream gradient. That is exact where the upstream
gradient is one number for all tokens (``loss.sum()``, however scaled, which PyTorch hands over as an expanded scalar,
known without asking the device). Any other upstream gradient is taken as a token weight and the gradients made anew.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megat2i.kernels.linear_cross_entropy.chunked import ChunkedHead
from megat2i.kernels.linear_cross_entropy.columns import local_pieces, local_rows
from megat2i.kernels.linear_cross_entropy.products import precision
from megat2i.kernels.linear_cross_entropy.tokens import Settings, token_values
from megat2i.kernels.registration import custom_op


@custom_op("linear_cross_entropy")
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    order: Tensor | None,
    ranges: list[int],
    blocks: list[int],
    mode: str,
    delta: float,
    ignore_index: int,
    z_loss: float,
    group_name: str,
    implementation: str,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], the other fields of TokenLosses [5, N], gradient of sum(loss) to hidden, to weight in float32).

    The gradient to hidden is in the dtype of ``hidden`` on a GPU, in float32 on a CPU. A gradient that is not asked for
    is an empty tensor. ``ranges`` and ``blocks`` are flattened pairs; ``group_name`` names the process group ("": the
    vocabulary is whole); ``order``: see LiveTokens.
    """
    # PyTorch's own functional collectives find their group by name in the same way.
    group = distributed_c10d._resolve_process_group(group_name) if group_name else None
    pairs, blocks = _pairs(ranges), _pairs(blocks)
    pieces = local_pieces(pairs, blocks, group.rank() if group else 0, group.size() if group else 1)
    settings = Settings(pairs, pieces, mode, delta, z_loss, group, hidden_gradient, weight_gradient)
    count, width = hidden.shape
    kind = torch.promote_types(hidden.dtype, torch.float32)
    taken = _taken(targets, order, ignore_index)
    outputs = torch.zeros((6, count + 1), dtype=kind, device=hidden.device)  # the last column is nobody's
    kept = _kept_dtype(hidden)
    grad_hidden = hidden.new_zeros((count + 1, width), dtype=kept) if hidden_gradient else None
    rows = weight.shape[0] if weight_gradient else 0
    grad_weight = torch.zeros((rows, width), dtype=kind, device=weight.device)
    # float16 has no exponents for small probabilities: computed in float32
    computed = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    head = _head(implementation)(weight.to(computed), settings)
    with precision(hidden.device, computed):
        total = count if taken is None else len(taken)
        size = head.rows_at_a_time(total)
        for start in range(0, total, size):
            place = slice(start, min(start + size, total)) if taken is None else taken[start : start + size]
            # of -1, an empty place of the bucket, the last token's numbers are read and nobody's written
            x, target = hidden[place].to(computed), targets[place]
            if taken is not None:
                target = target.masked_fill(place < 0, ignore_index)
            weights = None if token_weight is None else token_weight[place]
            values, x = _chunk(head, x, target, weights, ignore_index)
            outputs[:, place] = values.outputs
            _add_gradients(head, x, values, place, grad_hidden, grad_weight, total <= size)
    grad_hidden = hidden.new_empty((0, width), dtype=kept) if grad_hidden is None else grad_hidden[:count]
    return outputs[0, :count].clone(), outputs[1:, :count].clone(), grad_hidden.contiguous(), grad_weight


def _kept_dtype(hidden: Tensor) -> torch.dtype:
    """Of the gradient to ``hidden`` until the backward pass: where memory is scarce, that of the result.

    The bfloat16 products of a CPU have rounded it before; once more and the error would be above 3e-3.
    """
    return hidden.dtype if hidden.is_cuda else torch.promote_types(hidden.dtype, torch.float32)


def _head(implementation: str) -> type:
    if implementation == "chunked":
        return ChunkedHead
    from megat2i.kernels.linear_cross_entropy.triton_head import TritonHead  # needs Triton, which CPUs do without

    return TritonHead


def _taken(targets: Tensor, order: Tensor | None, ignore_index: int) -> Tensor | None:
    """The positions to compute [M], -1 for none; None: all. Asking a GPU which are live would wait for it."""
    if order is not None:
        return order
    return None if targets.is_cuda else (targets != ignore_index).nonzero()[:, 0]


def _chunk(head, x: Tensor, targets: Tensor, token_weight: Tensor | None, ignore_index: int):
    """(TokenValues, hidden states) of the rows of a chunk; the states of tokens that are ignored become 0."""
    live = targets != ignore_index
    own = torch.stack([(targets >= start) & (targets < end) for start, end in head.settings.ranges]) & live
    local_row = local_rows(targets, head.settings.pieces).masked_fill(~live, -1)
    x = x.masked_fill(~live[:, None], 0.0)
    statistics = head.statistics(x, local_row, own, live)
    return token_values(statistics, own, live, token_weight, head.settings), x


def _add_gradients(head, x: Tensor, values, place, grad_hidden: Tensor | None, grad_weight: Tensor, only: bool) -> None:
    settings = head.settings
    if not (settings.hidden_gradient or settings.weight_gradient):
        return
    head.differentiate(values)
    reduction = None
    if settings.hidden_gradient:
        part = head.hidden_gradient()
        if settings.group is not None:  # runs while the product below does
            reduction = dist.all_reduce(part, group=settings.group, async_op=True)
    if settings.weight_gradient:
        head.add_weight_gradient(x, grad_weight, only)
    if reduction is not None:
        reduction.wait()
    if settings.hidden_gradient:
        grad_hidden[place] = part.to(grad_hidden.dtype)


def _pairs(flat: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


@torch.library.register_fake("megat2i::linear_cross_entropy")
def _(hidden, weight, targets, token_weight, order, ranges, blocks, mode, delta, ignore_index, z_loss, group_name,
      implementation, hidden_gradient, weight_gradient):  # fmt: skip
    kind = torch.promote_types(hidden.dtype, torch.float32)
    count, width = hidden.shape
    return (
        hidden.new_empty((count,), dtype=kind),
        hidden.new_empty((5, count), dtype=kind),
        hidden.new_empty((count if hidden_gradient else 0, width), dtype=_kept_dtype(hidden)),
        weight.new_empty((weight.shape[0] if weight_gradient else 0, width), dtype=kind),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    loss, others, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(others, grad_hidden, grad_weight)
    hidden, weight, targets, token_weight, order, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, token_weight, order, grad_hidden, grad_weight)


def _backward(ctx, grad_loss, *_unused):
    hidden, weight, targets, token_weight, order, grad_hidden, grad_weight = ctx.saved_tensors
    wanted = ctx.options[-2:]
    if grad_loss is None:
        return (None,) * 15
    if len(grad_loss) == 0 or grad_loss.stride(0) == 0:  # one number for all tokens
        scale = grad_loss[:1] if len(grad_loss) else grad_loss.new_zeros(1)
        # of one dimension: scaled in float32, where a number would take the dtype of the gradient; and written at once
        grad_hidden, grad_weight = (
            torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in ((grad_hidden, hidden.dtype), (grad_weight, weight.dtype))
        )
    else:
        weights = grad_loss if token_weight is None else grad_loss * token_weight
        grad_hidden, grad_weight = linear_cross_entropy_op(hidden, weight, targets, weights, order, *ctx.options)[2:]
        grad_weight = grad_weight.to(weight.dtype)
    return grad_hidden if wanted[0] else None, grad_weight if wanted[1] else None, *(None,) * 13


torch.library.register_autograd("megat2i::linear_cross_entropy", _backward, setup_context=_setup)
