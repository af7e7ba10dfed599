"""Training: one optimizer step, validation, and the loop around them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megat2i import checkpoint
from megat2i.config import Config
from megat2i.console import Console
from megat2i.data.batches import Batch
from megat2i.loss import ModalityLoss, count_tokens
from megat2i.metrics import MetricsLog, StepMetrics, peak_flops
from megat2i.model.cost import flops_per_token
from megat2i.optim.engine import Engine
from megat2i.optim.schedule import learning_rate
from megat2i.parallel.invariants import unequal_copy
from megat2i.pipeline import Pipeline
from megat2i.printable import printable
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups

NON_FINITE_STEPS = 10  # in a row, after which a run has diverged for good


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


def train_step(
    pipeline: Pipeline, engine: Engine, batches: list[Batch], loss: ModalityLoss, groups: ParallelGroups, lr: float
) -> tuple[StepMetrics, float]:
    """One optimizer step over ``batches``, the micro-batches of this data-parallel rank.

    Returns what was measured over the global batch, and the gradient norm before clipping; the same on all ranks.
    """
    counts = _summed(count_tokens([b.modality for b in batches]), groups.data)  # the only normaliser there is
    sums = pipeline.run_schedule(batches, loss, counts, engine.loss_scale)
    grad_norm = engine.step(lr)
    return StepMetrics(*_summed(sums, groups.data, groups.pipeline), counts, loss.weights), grad_norm


def evaluate(pipeline: Pipeline, batches: list[Batch], loss: ModalityLoss, groups: ParallelGroups) -> StepMetrics:
    """Validation over this rank's ``batches``, with the same break-down as a training step."""
    counts = _summed(count_tokens([b.modality for b in batches]), groups.data)
    sums = pipeline.run_forward(batches)
    return StepMetrics(*_summed(sums, groups.data, groups.pipeline), counts, loss.weights)


def _summed(values: Tensor, *groups: ProcessGroup) -> Tensor:
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    total = values.to(device)
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(total, group=group)
    return total.cpu()


@dataclass(frozen=True)
class Data:
    """Where batches come from: micro-batches of a step, and the fixed validation batches of each split.

    ``captions``: for every training dataset its number of rows, of captions that do not fit a row, and the positions
    that would hold them all.
    """

    micro_batches: Callable[[int], list[Batch]]
    validation: dict[str, list[Batch]]
    captions: dict[str, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Everything that ``train`` works with. ``draw`` makes images [B, 3, H, W] of the configured prompts, if asked.

    All ranks of the first copy of the model draw together.
    """

    config: Config
    pipeline: Pipeline
    engine: Engine
    data: Data
    loss: ModalityLoss
    groups: ParallelGroups
    backend: Backend
    draw: Callable[[], np.ndarray] | None

    @property
    def checkpoints(self) -> Path:
        return Path(self.config.run.dir) / "checkpoints"


def train(run: Run, first_step: int) -> None:
    """Steps ``first_step`` .. the schedule's end (or ``stop_at``), with validation, samples and checkpoints on the way.

    Step numbers in all records count completed updates: the first is 1.
    """
    training, run_dir = run.config.training, Path(run.config.run.dir)
    steps = range(first_step + 1, (training.stop_at or training.steps) + 1)
    if dist.get_rank() != 0:
        _train(run, steps, None, None)
        return
    log = MetricsLog(run_dir, first_step)
    console = Console(run_dir, run.config.data.mode, first_step, steps.stop - 1, training.steps)
    try:
        _train(run, steps, log, console)
    finally:
        console.close()
    log.close()
    console.end()


def _train(run: Run, steps: range, log: MetricsLog | None, console: Console | None) -> None:
    training = run.config.training
    columns = sum(stop - start for start, stop in run.config.vocab_layout.ranges)
    flops = flops_per_token(run.config.model, columns, run.config.data.sequence_length)
    peak = peak_flops(run.backend.device, run.backend.dtype)
    non_finite = 0
    for step in steps:
        started = time.perf_counter()
        lr = learning_rate(step - 1, run.config.optimizer, training)
        batches = run.data.micro_batches(step - 1)
        metrics, grad_norm = train_step(run.pipeline, run.engine, batches, run.loss, run.groups, lr)
        seconds = time.perf_counter() - started
        non_finite = 0 if math.isfinite(grad_norm) else non_finite + 1
        if log:
            tokens_per_s = int(metrics.counts.sum()) / seconds
            entry = {"step": step, "lr": lr, **metrics.as_dict(), **run.loss.report(), "grad_norm": grad_norm}
            entry |= {"tokens_per_s": tokens_per_s, "step_s": seconds}
            entry["mfu"] = tokens_per_s * flops / (peak * dist.get_world_size()) if peak else None
            log.write(entry)
            console.step(entry)
        if non_finite == NON_FINITE_STEPS:  # the same on all ranks: the norm is global
            checkpoint.finish()
            raise RunError(
                f"the gradient was not finite for {non_finite} steps up to step {step}; all of them were skipped. "
                "Start a new run with a lower optimizer.lr or more training.warmup_steps"
            )
        _after_step(run, step, step == steps.stop - 1, log, console)


def _after_step(run: Run, step: int, last: bool, log: MetricsLog | None, console: Console | None) -> None:
    """Validation and samples where they are due and at the schedule's end; checkpoints also where the run stops."""
    training = run.config.training

    def due(every: int) -> bool:
        return step == training.steps or (every > 0 and step % every == 0)

    say_doing = console.doing if console else lambda what: None
    for split, batches in run.data.validation.items() if due(training.evaluate_every) else ():
        say_doing("measuring the held-out loss")
        metrics = evaluate(run.pipeline, batches, run.loss, run.groups)
        if log:
            entry = {"step": step, "split": split, **metrics.as_dict()}
            log.write(entry)
            console.held_out(entry)
    if run.draw and due(training.sample_every):
        say_doing("drawing samples")
        images = run.draw()
        if log:
            log.images(step, images, run.config.sampling.prompts)
    if last or due(training.checkpoint_every):
        say_doing("writing a checkpoint")
        if run.config.runtime.self_test:
            require_equal_copies(run)  # nothing wrong gets into a checkpoint
        if log:
            log.sync()  # a power cut must not leave a checkpoint that is ahead of the record
        background = training.asynchronous_checkpoints and not last
        layout = run.groups.layout()
        checkpoint.save(run.checkpoints, step, run.engine, layout, training.keep_checkpoints, background)


def require_equal_copies(run: Run) -> None:
    """Raises RunError on all ranks where copies of a parameter differ on some. Collective."""
    model = run.pipeline.model
    found = unequal_copy(dict(model.named_parameters()), model.shards(), run.groups)
    anywhere = torch.tensor(int(found is not None), device=run.backend.device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if anywhere:
        what = f"copies of {found[1]} differ on {found[0]}-parallel ranks" if found else "other ranks see copies differ"
        raise RunError(
            f"{what} (said by rank {dist.get_rank()}): a fault of hardware or communication since the last checkpoint, "
            "which is sound; find it, then continue with --resume"
        )
