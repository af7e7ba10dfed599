"""Linear layers whose weight is cut over the tensor-parallel ranks: by outputs (column), and by inputs (row).

Communication runs beside a matrix product where there is one to hide it: in the backward pass of a column-parallel
layer the input is collected again while its gradient is computed, and that gradient is reduced while the weight's is.
The forward collectives stand between two products that need each other, so nothing hides them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megat2i.parallel.collectives import TensorParallel, finished
from megat2i.parallel.shard import Shard


class WeightGradients:
    """Where linear layers leave the gradients of their weights to be computed while ``deferring`` (zero bubble).

    ``pending``: computations to be run later, each of which adds to ``weight.grad`` as the backward pass would have.
    """

    def __init__(self):
        self.deferring = False
        self.pending: list[Callable[[], None]] = []

    def take(self) -> list[Callable[[], None]]:
        """What was left since the last call; the caller runs it."""
        taken, self.pending = self.pending, []
        return taken

    def leave(self, weight: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """Leave ``compute``, which makes the gradient of ``weight``, for later."""

        def later() -> None:
            with torch.no_grad():
                gradient = compute()
            weight.backward(gradient)  # on the weight itself: runs the hooks by which engines collect gradients

        self.pending.append(later)


class ShardedModule(nn.Module):
    """A module with one ``weight``, of which this rank holds ``shard``."""

    def __init__(self, shard: Shard):
        super().__init__()
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(shard.local_shape))


class ParallelLinear(ShardedModule):
    """What both cuts have in common. ``function``: the autograd function that computes the layer."""

    function: type[torch.autograd.Function]

    def __init__(self, shard: Shard, parallel: TensorParallel, gradients: WeightGradients):
        super().__init__(shard)
        self.parallel, self.gradients = parallel, gradients

    def forward(self, x: Tensor, computed: bool = True) -> Tensor:
        """``computed=False``: only what the backward pass needs is saved again, the product is left out."""
        # Left for later, the weight is no input of this op: the backward pass must not touch its gradient. An op
        # without any input that needs a gradient would not be in the backward pass at all, so that one is not left.
        deferred = self.gradients.deferring and x.requires_grad and self.weight.requires_grad
        return self.function.apply(x, self.weight.detach() if deferred else self.weight, self, computed, deferred)


def _shard_of_parts(inputs: int, parts: tuple[int, ...], parallel: TensorParallel) -> Shard:
    shape = (sum(parts), inputs)
    if parallel.size == 1:
        return Shard.whole(shape)
    pieces, offset = [], 0
    for part in parts:
        start, stop = parallel.share(part)
        pieces.append((offset + start, offset + stop))
        offset += part
    return Shard(shape, 0, tuple(pieces))


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, layer: ParallelLinear, computed: bool, deferred: bool) -> Tensor:
        ctx.save_for_backward(x, weight)  # with sequence parallelism x is this rank's part only
        ctx.layer, ctx.deferred = layer, deferred
        return finished(layer.parallel.start_enter(x)) @ weight.T if computed else x.new_empty(0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        layer, parallel = ctx.layer, ctx.layer.parallel
        input_needed, weight_needed, *_ = ctx.needs_input_grad
        collecting = parallel.start_enter(x) if weight_needed else None
        reducing = parallel.start_leave(grad @ weight) if input_needed else None
        grad_weight = grad.T @ finished(collecting) if weight_needed else None
        if ctx.deferred:
            layer.gradients.leave(layer.weight, lambda: grad.T @ finished(parallel.start_enter(x)))
        return finished(reducing) if input_needed else None, grad_weight, None, None, None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, layer: ParallelLinear, computed: bool, deferred: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.deferred = layer, deferred
        return finished(layer.parallel.start_leave(x @ weight.T)) if computed else x.new_empty(0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        layer = ctx.layer
        input_needed, weight_needed, *_ = ctx.needs_input_grad
        whole = finished(layer.parallel.start_enter(grad))
        grad_x = whole @ weight if input_needed else None
        grad_weight = whole.T @ x if weight_needed else None
        if ctx.deferred:
            layer.gradients.leave(layer.weight, lambda: whole.T @ x)
        return grad_x, grad_weight, None, None, None


class ColumnParallelLinear(ParallelLinear):
    """Tokens between layers -> [N, outputs / t]. ``parts``: sizes of outputs that are cut one by one, as q, k and v."""

    function = _ColumnParallel

    def __init__(self, inputs: int, parts: tuple[int, ...], parallel: TensorParallel, gradients: WeightGradients):
        super().__init__(_shard_of_parts(inputs, parts, parallel), parallel, gradients)


class RowParallelLinear(ParallelLinear):
    """[N, inputs / t] -> tokens between layers, summed over the ranks."""

    function = _RowParallel

    def __init__(self, inputs: int, outputs: int, parallel: TensorParallel, gradients: WeightGradients):
        super().__init__(Shard((outputs, inputs), 1, (parallel.share(inputs),)), parallel, gradients)
