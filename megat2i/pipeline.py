"""Runs the micro-batches of a step through the stages of the model: forward and backward, gradients left to the engine.

The order of work comes from ``pipeline_order``; with one pipeline rank it is forward, backward, forward, backward.
PyTorch has such schedules (``torch.distributed.pipelining``), but they hold a receive buffer and its gradient for every
micro-batch of the step, where a schedule promises a few in flight, negotiate shapes with pickled objects, and split the
backward pass for zero bubble by taking the autograd graph apart, which the loss head's own function does not allow.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from megat2i.data.batches import Batch
from megat2i.kernels import TokenLosses
from megat2i.loss import ModalityLoss, sum_by_modality
from megat2i.model.gpt import GPT, Cache
from megat2i.model.partition import StageLayers
from megat2i.pipeline_order import (
    BACKWARD,
    FORWARD,
    RECEIVE,
    RECEIVE_GRADIENT,
    SEND,
    SEND_GRADIENT,
    WEIGHTS,
    Action,
    evaluation_order,
    training_order,
)
from megat2i.progress_marks import beat
from megat2i.topology import ParallelGroups


class Pipeline:
    """The stages that this rank holds, and its neighbours. ``schedule``: one of ``pipeline_order.SCHEDULES``."""

    def __init__(self, model: GPT, groups: ParallelGroups, schedule: str = "1f1b"):
        self.model, self.groups, self.schedule = model, groups, schedule
        ranks, rank = groups.pipeline_size, groups.pipeline_rank
        self.stages: dict[int, StageLayers] = {rank + n * ranks: stage for n, stage in enumerate(model.stages)}
        self.peak_in_flight = 0  # micro-batches whose activations were held at once, in the last step

    def run_schedule(self, batches: list[Batch], loss: ModalityLoss, counts: Tensor, scale: float) -> Tensor:
        """Forward and backward over ``batches``; returns sums by modality [3, 3]: nll, correct, off-range mass.

        ``counts`` [3]: positions of each modality in the global batch; ``scale``: the engine's factor on the objective.
        The sums are of the ranks that hold the head; on others they are 0.
        """
        order = training_order(self.schedule, self.groups.pipeline_size, len(self.stages), len(batches))
        weights = [loss.token_weight(batch.modality, counts) if self.has_head else None for batch in batches]
        step = _Step(self, batches, weights, loss.z_loss, partial(loss.objective, scale=scale))
        self.model.weight_gradients.deferring = self.schedule == "zero_bubble"
        try:
            return step.run(order[self.groups.pipeline_rank])
        finally:
            self.model.weight_gradients.deferring = False
            self.peak_in_flight = step.peak_in_flight

    @torch.no_grad()
    def run_forward(self, batches: list[Batch]) -> Tensor:
        """Forward only; returns the same sums [3, 3]."""
        order = evaluation_order(self.groups.pipeline_size, len(self.stages), len(batches))
        step = _Step(self, batches, [None] * len(batches), 0.0, None)
        return step.run(order[self.groups.pipeline_rank])

    @property
    def has_head(self) -> bool:
        return any(stage.head for stage in self.stages.values())

    @property
    def device(self) -> torch.device:
        return self.model.device

    def new_cache(self, batch: int, max_length: int, first: Tensor | None = None) -> Cache:
        """As ``GPT.new_cache``, for the layers that this rank holds."""
        return self.model.new_cache(batch, max_length, first)

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: Cache, columns: slice) -> Tensor:
        """As ``GPT.next_logits``, on every rank of one copy of the model, which all must call it."""
        beat()
        if self.groups.pipeline_size == 1:
            return self.model.next_logits(tokens, cache, columns)
        stages = self.groups.pipeline_size * len(self.stages)
        x = None
        for number in range(stages):
            if number not in self.stages:
                continue
            if number and self._peer(number - 1) != self.groups.pipeline_rank:
                x = self._boundary(tokens.numel())
                dist.recv(x, group=self.groups.pipeline, group_src=self._peer(number - 1))
            x = self.model.run_stage(self.stages[number], tokens, x, cache)
            if number + 1 < stages and self._peer(number + 1) != self.groups.pipeline_rank:
                dist.send(x, group=self.groups.pipeline, group_dst=self._peer(number + 1))
        cache.position += tokens.shape[1]
        if self.has_head:
            # contiguous: with tensor parallelism they are columns of a wider tensor, and bytes are sent as they lie
            logits = self.model.last_logits(x, len(tokens), columns).contiguous()
        else:
            logits = torch.empty(len(tokens), columns.stop - columns.start, device=self.device)
        dist.broadcast(logits, group=self.groups.pipeline, group_src=self._peer(stages - 1))
        return logits

    def _peer(self, stage: int) -> int:
        return stage % self.groups.pipeline_size

    def _boundary(self, tokens: int) -> Tensor:
        """Room for what one stage hands to the next."""
        parallel = self.model.parallel
        rows = tokens // parallel.size if parallel.sequence else tokens
        like = next(self.model.parameters())
        return torch.empty(rows, self.model.shape.hidden, dtype=like.dtype, device=like.device)


class _Step:
    """One pass over the micro-batches: what has arrived, what is held for the backward pass, what is under way."""

    def __init__(
        self,
        pipeline: Pipeline,
        batches: list[Batch],
        weights: list[Tensor | None],
        z_loss: float,
        objective: Callable[[TokenLosses], Tensor] | None,
    ):
        self.pipeline, self.batches, self.weights = pipeline, batches, weights
        self.z_loss, self.objective = z_loss, objective
        self.arriving: dict[tuple[str, int, int], tuple[Tensor, dist.Work]] = {}
        self.leaving: dict[tuple[str, int, int], Tensor] = {}
        self.sending: dict[str, tuple[dist.Work, Tensor]] = {}
        self.held: dict[tuple[int, int], tuple] = {}  # input, and the edge of the graph where the backward pass starts
        self.deferred: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.sums = torch.zeros(3, 3, dtype=torch.float64, device=pipeline.device)
        self.peak_in_flight = 0

    def run(self, order: list[Action]) -> Tensor:
        perform = {
            FORWARD: self._forward,
            BACKWARD: self._backward,
            WEIGHTS: self._weights,
            SEND: partial(self._send, SEND, 1),
            SEND_GRADIENT: partial(self._send, SEND_GRADIENT, -1),
            RECEIVE: partial(self._receive, FORWARD, -1),
            RECEIVE_GRADIENT: partial(self._receive, BACKWARD, 1),
        }
        for kind, stage, micro_batch in order:
            perform[kind](stage, micro_batch)
            beat()
            self.peak_in_flight = max(self.peak_in_flight, len(self.held) + len(self.deferred))
        for work, _ in self.sending.values():
            work.wait()
        return self.sums.cpu()  # once: a GPU's host must not wait for every micro-batch

    def _forward(self, stage: int, micro_batch: int) -> None:
        model, batch = self.pipeline.model, self.batches[micro_batch]
        layers = self.pipeline.stages[stage]
        x = None if layers.embedding else self._arrived(FORWARD, stage, micro_batch)
        if x is not None and self.objective is not None:
            x.requires_grad_()
        out = model.run_stage(layers, batch.tokens, x)
        if not layers.head:
            self.leaving[SEND, stage, micro_batch] = out.detach()
        else:
            losses = model.losses(out, batch.labels, self.weights[micro_batch], self.z_loss, batch.live)
            self.sums += _sums(losses, batch)
            out = self.objective(losses) if self.objective is not None else None
        if self.objective is not None:  # the edge, not the tensor: what was sent need not be kept
            self.held[stage, micro_batch] = (x, get_gradient_edge(out))

    def _backward(self, stage: int, micro_batch: int) -> None:
        x, edge = self.held.pop((stage, micro_batch))
        head = self.pipeline.stages[stage].head
        gradient = torch.ones((), device=self.pipeline.device) if head else self._arrived(BACKWARD, stage, micro_batch)
        torch.autograd.backward(edge, gradient)
        if x is not None:
            self.leaving[SEND_GRADIENT, stage, micro_batch] = x.grad
        left = self.pipeline.model.weight_gradients.take()
        if left:
            self.deferred[stage, micro_batch] = left

    def _weights(self, stage: int, micro_batch: int) -> None:
        for compute in self.deferred.pop((stage, micro_batch), ()):  # of layers that do not learn nothing is left
            compute()

    def _send(self, what: str, direction: int, stage: int, micro_batch: int) -> None:
        tensor = self.leaving.pop((what, stage, micro_batch))
        if what in self.sending:  # at most one under way in each direction, so that what was sent can be freed
            self.sending.pop(what)[0].wait()
        peer = self.pipeline._peer(stage + direction)
        self.sending[what] = (dist.isend(tensor, group=self._link(direction), group_dst=peer), tensor)

    def _receive(self, kind: str, direction: int, stage: int, micro_batch: int) -> None:
        tensor = self.pipeline._boundary(self.batches[micro_batch].tokens.numel())
        peer = self.pipeline._peer(stage + direction)
        work = dist.irecv(tensor, group=self._link(-direction), group_src=peer)
        self.arriving[kind, stage, micro_batch] = (tensor, work)

    def _link(self, direction: int) -> dist.ProcessGroup:
        """The group for messages to the next stages (1) or to the ones before (-1)."""
        groups = self.pipeline.groups
        return groups.pipeline if direction == 1 else groups.pipeline_back

    def _arrived(self, kind: str, stage: int, micro_batch: int) -> Tensor:
        tensor, work = self.arriving.pop((kind, stage, micro_batch))
        work.wait()
        return tensor


@torch.no_grad()
def _sums(losses: TokenLosses, batch: Batch) -> Tensor:
    fields = (losses.nll, losses.correct, losses.off_range_mass)
    return torch.stack([sum_by_modality(values, batch.modality) for values in fields])
