"""Training: one optimizer step, validation, and the loop around them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megat2i import checkpoint
from megat2i.config import Config
from megat2i.console import Console
from megat2i.data.batches import Batch, Sample
from megat2i.data.indexed import IndexedDataset
from megat2i.data.verification import Touched, Verification
from megat2i.files import DataFileError
from megat2i.loss import ModalityLoss, count_tokens
from megat2i.metrics import MetricsLog, StepMetrics, peak_flops
from megat2i.model.cost import flops_per_token
from megat2i.optim.engine import Engine
from megat2i.optim.finite import not_finite
from megat2i.optim.schedule import learning_rate
from megat2i.parallel.invariants import unequal_copy
from megat2i.pipeline import Pipeline
from megat2i.printable import printable
from megat2i.progress import say
from megat2i.progress_marks import mark
from megat2i.runtime import Backend
from megat2i.save_requests import SaveRequested, SaveRequests, record_finished
from megat2i.spikes import REWINDS, Spikes
from megat2i.topology import ParallelGroups

NON_FINITE_STEPS = 10  # in a row, after which a run has diverged for good


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


def train_step(
    pipeline: Pipeline,
    engine: Engine,
    batches: list[Batch],
    loss: ModalityLoss,
    groups: ParallelGroups,
    lr: float,
    accept: Callable[[float, float], bool] | None = None,
    problem: DataFileError | None = None,
    requests: SaveRequests | None = None,
) -> tuple[StepMetrics, float]:
    """One optimizer step over ``batches``, the micro-batches of this data-parallel rank.

    ``accept``: asked with the loss and the gradient norm whether to update; collective, one answer for all ranks.
    Returns what was measured over the global batch, and the gradient norm before clipping; the same on all ranks.
    Raises on all ranks where one has a ``problem`` with its data, and SaveRequested, before anything is computed, where
    one is asked to save the state as it is.
    """
    mark("forward and backward")
    counts = _global_counts(batches, groups, problem, requests)  # the only normaliser there is
    sums = pipeline.run_schedule(batches, loss, counts, engine.loss_scale)
    mark("optimizer step")
    metrics = StepMetrics(*_summed(sums, groups.data, groups.pipeline), counts, loss.weights)
    return metrics, engine.step(lr, partial(accept, metrics.loss) if accept else None)


def _global_counts(
    batches: list[Batch],
    groups: ParallelGroups,
    problem: DataFileError | None,
    requests: SaveRequests | None = None,
) -> Tensor:
    """Positions of each modality [3] in the global batch.

    The same reduction tells all ranks of a ``problem``, and of what any of them is asked for.
    """
    counts = count_tokens([b.modality for b in batches])
    if groups.tensor_rank or groups.pipeline_rank:
        counts.zero_()  # these rows are counted by the first rank of this copy of the model
    asked = requests.flags() if requests else []
    flags = torch.tensor([int(problem is not None), *asked])
    counts, problems, asked = _summed(torch.cat((counts, flags)), dist.group.WORLD).split([len(counts), 1, len(asked)])
    if problems:
        checkpoint.finish()  # what was saved before is sound
        require_data(problem)
    if asked.any():
        raise SaveRequested.of(asked.tolist())
    return counts


def require_data(problem: DataFileError | None) -> None:
    """Raise on all ranks what the first of them that has a ``problem`` says of its data. Collective."""
    sentence = checkpoint.first_problem(None if problem is None else str(problem))
    if sentence is not None:
        raise problem if dist.get_world_size() == 1 else RunError(sentence)


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
    that would hold them all. ``samples``: where the rows of a whole global batch came from. ``stores``: whose bytes are
    verified beside training; ``touched``: where each step reads them, from a first one on.
    """

    micro_batches: Callable[[int], list[Batch]]
    validation: dict[str, list[Batch]]
    captions: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    samples: Callable[[int], list[Sample]] = lambda step: []
    stores: list[IndexedDataset] = field(default_factory=list)
    touched: Callable[[int], Touched] = lambda first_step: ()


@dataclass(frozen=True)
class Run:
    """Everything that ``train`` works with. ``draw`` makes images [B, 3, H, W] of the configured prompts, if asked.

    All ranks of the first copy of the model draw together. ``fence``: called by the first rank before it writes to the
    run folder; it ends the process where that is another launch's by now.
    """

    config: Config
    pipeline: Pipeline
    engine: Engine
    data: Data
    loss: ModalityLoss
    groups: ParallelGroups
    backend: Backend
    draw: Callable[[], np.ndarray] | None
    spikes: Spikes = field(default_factory=Spikes)
    verification: Verification | None = None
    requests: SaveRequests = field(default_factory=SaveRequests)
    fence: Callable[[], None] = lambda: None

    @property
    def checkpoints(self) -> Path:
        return Path(self.config.run.dir) / "checkpoints"


def train(run: Run, first_step: int) -> SaveRequested | None:
    """Steps ``first_step`` .. the schedule's end (or ``stop_at``), with validation, samples and checkpoints on the way.

    Step numbers in all records count completed updates: the first is 1. Returns, on all ranks, what made the launch
    save and leave before; None where it came to its end.
    """
    training, run_dir = run.config.training, Path(run.config.run.dir)
    steps = range(first_step + 1, (training.stop_at or training.steps) + 1)
    run.requests.begin()
    if dist.get_rank() != 0:
        request = _train(run, steps, None, None)
        run.requests.end(request)
        return request
    log = MetricsLog(run_dir, first_step, run.fence)
    console = Console(run_dir, run.config.data.mode, first_step, steps.stop - 1, training.steps)
    try:
        request = _train(run, steps, log, console)
    finally:
        console.close()
    log.close()
    run.fence()
    if request:
        request.record(run_dir, run.requests.saved_step)
    else:
        if steps.stop - 1 == training.steps:
            record_finished(run_dir, training.steps)
        console.end()
    run.requests.end(request)
    return request


def _train(run: Run, steps: range, log: MetricsLog | None, console: Console | None) -> SaveRequested | None:
    training = run.config.training
    columns = sum(stop - start for start, stop in run.config.vocab_layout.ranges)
    flops = flops_per_token(run.config.model, columns, run.config.data.sequence_length)
    peak = peak_flops(run.backend.device, run.backend.dtype)
    accept = partial(_accept, run.spikes) if training.on_spike == "skip" else None
    step, rewound = steps.start, {}
    while step < steps.stop:
        started = time.perf_counter()
        lr = learning_rate(step - 1, run.config.optimizer, training)
        mark("reading data", step)
        number, updates = run.spikes.batch(step), run.engine.updates
        batches, problem = _read(run, number)
        state = run.pipeline, run.engine, batches, run.loss, run.groups
        try:
            metrics, grad_norm = train_step(*state, lr, accept, problem, run.requests)
        except SaveRequested as request:
            _answer(run, step - 1, request, log, console)
            if request.leaving:
                return request
            continue
        seconds = time.perf_counter() - started
        spike, usual_loss = run.spikes.is_spike(metrics.loss, grad_norm), run.spikes.loss.mean
        run.spikes.add(step, metrics.loss, grad_norm)
        if log:
            tokens_per_s = int(metrics.counts.sum()) / seconds
            entry = {"step": step, "lr": lr, **metrics.as_dict(), **run.loss.report(), "grad_norm": grad_norm}
            entry |= {"tokens_per_s": tokens_per_s, "step_s": seconds}
            entry["mfu"] = tokens_per_s * flops / (peak * dist.get_world_size()) if peak else None
            entry |= {"skipped": updates + 1 - run.engine.updates, "spike": int(spike)} | rewound
            if spike:
                entry |= {"usual_loss": usual_loss, "samples": run.data.samples(number)}
            log.write(entry)
            console.step(entry)
        diverged = run.spikes.not_finite >= NON_FINITE_STEPS  # the same on all ranks: the norm is global
        back = None
        if training.on_spike == "rewind" and checkpoint.first_rank_decides(spike or diverged):
            back = _go_back(run, step, log, console)
        if back:
            step, rewound = back
        elif diverged:
            checkpoint.finish()
            raise RunError(
                f"the gradient was not finite for {NON_FINITE_STEPS} steps up to step {step}; all of them were "
                "skipped. Start a new run with a lower optimizer.lr or more training.warmup_steps"
            )
        else:
            rewound = {}
            _after_step(run, step, step == steps.stop - 1, log, console)
        step += 1
    require_data(run.verification.problem if run.verification else None)
    return None


def _read(run: Run, number: int) -> tuple[list[Batch], DataFileError | None]:
    """The micro-batches of global batch ``number``, and what is wrong with the data as far as this rank knows."""
    try:
        batches, problem = run.data.micro_batches(number), None
    except DataFileError as error:
        batches, problem = [], error
    return batches, problem or (run.verification.problem if run.verification else None)


def _accept(spikes: Spikes, loss: float, grad_norm: float) -> bool:
    """Whether a step is no spike, by the first rank's numbers. Collective."""
    return not checkpoint.first_rank_decides(spikes.is_spike(loss, grad_norm))


def _go_back(run: Run, step: int, log: MetricsLog | None, console: Console | None) -> tuple[int, dict] | None:
    """Become what the run was at a checkpoint before the spike at ``step``, and pass over the batches in between.

    Returns the step of that checkpoint, and what the record of the next step says of it; None where there is no
    checkpoint. Collective; raises RunError after REWINDS of them for one spike.
    """
    report = say if log else lambda line: None
    if run.spikes.rewinds == REWINDS:
        checkpoint.finish()
        raise RunError(
            f"the loss spikes at step {step}, and did so after each of {REWINDS} rewinds. Continue with --resume "
            "training.on_spike=skip, or start a new run with a lower optimizer.lr"
        )
    passing = min(run.spikes.rewinds, 1)  # a further rewind goes back beyond the checkpoint that did not help
    found = checkpoint.go_back(run.checkpoints, run.engine, step, passing, report)
    if found is None:
        report(f"there is no sound checkpoint before step {step:,} to go back to: training goes on")
        return None
    run.requests.saved_step = found.step
    first, last = run.spikes.go_back(found.manifest.get("training", {}), found.step, step)
    if log:
        log.go_back(found.step)
        console.go_back(found.step)
        say(f"went back to step {found.step:,}; batches {first + 1:,} to {last + 1:,} are passed over from now on")
    return found.step, {"rewound_from": step, "passed_over": [first + 1, last + 1]}


def _after_step(run: Run, step: int, last: bool, log: MetricsLog | None, console: Console | None) -> None:
    """Validation and samples where they are due and at the schedule's end; checkpoints also where the run stops."""
    training = run.config.training

    def due(every: int) -> bool:
        return step == training.steps or (every > 0 and step % every == 0)

    def begin(phase: str) -> None:
        mark(phase)
        if console:
            console.doing(phase)

    for split, batches in run.data.validation.items() if due(training.evaluate_every) else ():
        begin("measuring the held-out loss")
        metrics = evaluate(run.pipeline, batches, run.loss, run.groups)
        if log:
            entry = {"step": step, "split": split, **metrics.as_dict()}
            log.write(entry)
            console.held_out(entry)
    if run.draw and due(training.sample_every):
        begin("drawing samples")
        images = run.draw()
        if log:
            log.images(step, images, run.config.sampling.prompts)
    if last or due(training.checkpoint_every):
        begin("writing a checkpoint")
        _save(run, step, training.asynchronous_checkpoints and not last, log)


def _save(run: Run, step: int, background: bool, log: MetricsLog | None) -> None:
    training = run.config.training
    require_sound_state(run, step)  # nothing wrong gets into a checkpoint
    if log:
        log.sync()  # a power cut must not leave a checkpoint that is ahead of the record
    saved = checkpoint.save(
        run.checkpoints,
        step,
        run.engine,
        run.groups.layout(),
        training.keep_checkpoints,
        background,
        keep_every=training.keep_every,
        training=run.spikes.state(),
        fence=run.fence,
    )
    run.requests.saved(step, saved.stall_s)


def _answer(run: Run, step: int, request: SaveRequested, log: MetricsLog | None, console: Console | None) -> None:
    """Save the state after ``step``, unless it is saved already; it is committed on return. Collective."""
    run.requests.hold()
    mark("writing a checkpoint", step)
    if console:
        console.doing(f"writing a checkpoint ({request})")
    if run.requests.saved_step != step:
        _save(run, step, False, log)
    checkpoint.finish()  # a save in the background
    run.requests.answered(request)
    if not request.leaving:
        if log:
            say(f"{request}: step {step:,} is saved, and training goes on")
        run.requests.begin()


def require_sound_state(run: Run, step: int) -> None:
    """Raises RunError on all ranks where a value of the state after ``step`` is not finite on any.

    With ``runtime.self_test`` also where copies of a parameter differ. Collective.
    """
    where = not_finite(run.engine.fragments())
    problem = where and f"{where} is not finite"
    if run.config.runtime.self_test:
        model = run.pipeline.model
        found = unequal_copy(dict(model.named_parameters()), model.shards(), run.groups)
        if found and not problem:
            problem = f"copies of {found[1]} differ on {found[0]}-parallel ranks (rank {dist.get_rank()} is one)"
    problem = checkpoint.first_problem(problem)
    if not problem:
        return
    checkpoint.finish()
    saved = checkpoint.committed(run.checkpoints)
    if saved:
        remedy = f"the last checkpoint, {saved[0]}, is sound; find the fault, then continue from it with --resume"
    else:
        remedy = "there is no checkpoint yet; find the fault, such as model.pretrained, then start again"
    raise RunError(f"{problem} after step {step}, by a fault of hardware, communication or data: {remedy}")
