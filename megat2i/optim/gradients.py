"""Sums of gradients over micro-batches and data-parallel ranks, in flat float32 buckets.

A bucket is reduced as soon as the last micro-batch has added to all of its parameters, beside the rest of the backward
pass. One all-reduce of many parameters costs one latency.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

BUCKET_ELEMENTS = 1 << 24  # 64 MB: long enough for full bandwidth, short enough to start early


class GradientSums:
    """``of``: the sum for every parameter by name, a view of its bucket in the parameter's shape."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], micro_batches: int, group: ProcessGroup, reduce_dtype: torch.dtype
    ):
        self.micro_batches, self.group, self.reduce_dtype = micro_batches, group, reduce_dtype
        self.of: dict[str, Tensor] = {}
        self.buckets: list[Tensor] = []
        self.added: list[dict[str, int]] = []  # of every bucket: how often each parameter was added to
        self.reducing: dict[int, tuple[Tensor, dist.Work]] = {}
        bucket: dict[str, nn.Parameter] = {}
        for name, parameter in reversed(parameters.items()):  # the order in which backward passes come to them
            if bucket and sum(p.numel() for p in bucket.values()) + parameter.numel() > BUCKET_ELEMENTS:
                self._open(bucket)
                bucket = {}
            bucket[name] = parameter
        if bucket:
            self._open(bucket)

    def _open(self, parameters: dict[str, nn.Parameter]) -> None:
        number, sizes = len(self.buckets), [p.numel() for p in parameters.values()]
        device = next(iter(parameters.values())).device
        self.buckets.append(torch.zeros(sum(sizes), device=device))
        self.added.append(dict.fromkeys(parameters, 0))
        for (name, parameter), view in zip(parameters.items(), self.buckets[-1].split(sizes), strict=True):
            self.of[name] = view.view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(self._adder(number, name))

    def _adder(self, number: int, name: str):
        total, added = self.of[name], self.added[number]

        def add(parameter: nn.Parameter) -> None:
            total.add_(parameter.grad)
            parameter.grad = None
            added[name] += 1
            if added[name] == self.micro_batches and min(added.values()) == self.micro_batches:
                self._start_reduction(number)

        return add

    def _start_reduction(self, number: int) -> None:
        if self.group.size() > 1:
            gradient = self.buckets[number].to(self.reduce_dtype)
            self.reducing[number] = (gradient, dist.all_reduce(gradient, group=self.group, async_op=True))

    def reduce(self) -> None:
        """Wait until every sum is over all ranks. Raises RuntimeError where a step had too many micro-batches."""
        if any(count > self.micro_batches for added in self.added for count in added.values()):
            raise RuntimeError(f"more than {self.micro_batches} micro-batches were added to one step's gradient")
        for number, bucket in enumerate(self.buckets):
            if number not in self.reducing:  # a step of fewer micro-batches, or a parameter that took no part
                self._start_reduction(number)
            if number in self.reducing:
                gradient, work = self.reducing.pop(number)
                work.wait()
                bucket.copy_(gradient)

    def zero(self) -> None:
        """Begin the next step."""
        for bucket, added in zip(self.buckets, self.added, strict=True):
            bucket.zero_()
            added.update(dict.fromkeys(added, 0))
