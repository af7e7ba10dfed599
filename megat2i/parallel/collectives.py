"""Tensor parallelism's collectives, each with its conjugate in the backward pass.

Activations are [N, D] tokens. With sequence parallelism every rank holds N / t consecutive tokens between the layers
(Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2), otherwise
all of them (Shoeybi et al. 2019, "Megatron-LM", section 3: its f and g).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share every layer. ``sequence``: between the layers each holds a part of the tokens."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence: bool = False

    def share(self, length: int) -> tuple[int, int]:
        """(start, stop) of this rank's part of ``length`` equal things; raises ValueError where they do not divide."""
        if length % self.size:
            raise ValueError(f"{length} does not divide into {self.size} tensor-parallel parts")
        part = length // self.size
        return self.rank * part, (self.rank + 1) * part

    def start_gather(self, x: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Begin to collect [N / t, ...] of all ranks into [N, ...]; wait for the work before using it."""
        if self.size == 1:
            return x, None
        whole = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=self.group, async_op=True)

    def start_reduce(self, x: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Begin to sum [N, ...] over ranks in place."""
        if self.size == 1:
            return x, None
        x = x.contiguous()
        return x, dist.all_reduce(x, group=self.group, async_op=True)

    def start_reduce_scatter(self, x: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Begin to sum [N, ...] over ranks, of which this one keeps its part [N / t, ...]."""
        if self.size == 1:
            return x, None
        start, stop = self.share(x.shape[0])
        part = x.new_empty((stop - start, *x.shape[1:]))
        return part, dist.reduce_scatter_tensor(part, x.contiguous(), group=self.group, async_op=True)

    def start_enter(self, x: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Begin to make the tokens between layers the input of a layer: all tokens on every rank."""
        return self.start_gather(x) if self.sequence else (x, None)

    def start_leave(self, partial: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Begin to make the partial sums of a layer (or of the gradient of its input) tokens between layers."""
        return self.start_reduce_scatter(partial) if self.sequence else self.start_reduce(partial)


ALONE = TensorParallel()


def finished(started: tuple[Tensor, dist.Work | None]) -> Tensor:
    """The result of a collective, once it is there."""
    result, work = started
    if work is not None:
        work.wait()
    return result


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return finished(parallel.start_leave(partial))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return finished(ctx.parallel.start_enter(grad)), None


def leave(partial: Tensor, parallel: TensorParallel) -> Tensor:
    """Partial sums [N, D] of every rank -> their sum, as tokens between layers [N or N / t, D]."""
    return partial if parallel.size == 1 else _Leave.apply(partial, parallel)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return finished(parallel.start_gather(x))

    @staticmethod
    def backward(ctx, grad: Tensor):
        start, stop = ctx.parallel.share(grad.shape[0])
        return grad[start:stop], None


def gather_tokens(x: Tensor, parallel: TensorParallel) -> Tensor:
    """Tokens between layers -> all tokens [N, D], for an op whose gradient is already summed over the ranks."""
    return _GatherTokens.apply(x, parallel) if parallel.sequence and parallel.size > 1 else x


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return finished(ctx.parallel.start_reduce(grad.clone())), None


def summed_gradient(parameter: Tensor, parallel: TensorParallel) -> Tensor:
    """A replicated parameter that each rank applies to something else: the ranks' gradients are summed."""
    return parameter if parallel.size == 1 else _SumGradient.apply(parameter, parallel)


def shared_parameter(parameter: Tensor, parallel: TensorParallel) -> Tensor:
    """A replicated parameter that each rank applies to its own tokens only: the ranks' gradients are summed.

    A small all-reduce for every use. Collecting them for one all-reduce a step would save latency, but every engine
    keeps gradients its own way, and this is right under all of them.
    """
    return summed_gradient(parameter, parallel) if parallel.sequence else parameter


class _GatherStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return finished(parallel.start_gather(x)).view(parallel.size, *x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return finished(ctx.parallel.start_reduce_scatter(grad.flatten(0, 1))), None


def gather_statistics(x: Tensor, parallel: TensorParallel) -> Tensor:
    """[N, K] of this rank -> [t, N, K] of all ranks; the gradients of all ranks' uses come back summed."""
    return _GatherStatistics.apply(x, parallel)
