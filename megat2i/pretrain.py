"""Starts a training run: backend, run folder, model, engine and data, then ``trainer.train``.

What the model, the data and the loss are is given by the three providers of the entry script.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megat2i import checkpoint, config_rules, run_folder, run_lock
from megat2i.config import Config
from megat2i.data.sizes import require_stores, with_data_sizes
from megat2i.data.verification import Verification
from megat2i.files import DataFileError
from megat2i.generate import Sampler
from megat2i.loss import ModalityLoss
from megat2i.model import freezing, pretrained
from megat2i.model.cost import model_parameters
from megat2i.model.gpt import GPT
from megat2i.model.part import Part, part_of
from megat2i.optim.engine import Engine
from megat2i.optim.torch_engine import TorchEngine
from megat2i.pipeline import Pipeline
from megat2i.progress import count, say, waiting
from megat2i.progress_marks import mark, start_watchdog
from megat2i.runtime import Backend
from megat2i.save_requests import SaveRequested, SaveRequests, forget_end
from megat2i.self_test import require_same_launch, self_test
from megat2i.spikes import Spikes
from megat2i.topology import ParallelGroups
from megat2i.trainer import Data, Run, RunError, require_data, require_sound_state, train

BYTES_PER_PARAMETER = 16  # of a checkpoint, at most: weight, master weight and two moments in float32

Providers = tuple[
    Callable[[Config, Backend, Part], GPT],
    Callable[[Config, Backend, ParallelGroups], Data],
    Callable[[Config], ModalityLoss],
]


def pretrain(settings: Config, resume: bool, providers: Providers) -> tuple[Config, SaveRequested | None]:
    """Train to the end of the schedule or to ``training.stop_at``; collective over all ranks of the launch.

    Returns the settings with all that they left open, and what made the launch save and leave before, if anything did.
    """
    settings, backend = _resolved(settings, resume)
    run_dir = Path(settings.run.dir)
    if backend.world_size > 1 and settings.runtime.watchdog_s:
        start_watchdog(run_dir, settings.runtime.watchdog_s, backend.launch)
    backend.start(settings.model.seed)
    groups = ParallelGroups.create(settings.parallel)
    if settings.runtime.self_test and backend.world_size > 1:
        require_same_launch(settings, run_folder.data_identity(settings))
        self_test(settings, backend, groups, _engine)
    provide_model, provide_data, provide_loss = providers
    mark("opening the data")
    data = _provided(lambda: provide_data(settings, backend, groups))
    # Nothing of a run that is refused up to here; and what was checked is looked at again, now that it stays as it is.
    lock = run_lock.take(run_dir, functools.partial(run_folder.check, run_dir, settings, resume))
    leader = backend.rank == 0
    report = say if leader else lambda line: None
    found = _newest_checkpoint(run_dir, report) if resume else None
    first_step = found.step if found else 0
    verification = _verification(data, run_dir, first_step, backend)
    # a checkpoint replaces every weight: the pre-trained model need not be there any more
    begin = _without_pretrained(settings) if found else settings
    mark("making the model")
    with waiting(f"loading {found.path}" if found else "making the model", leader):
        model = provide_model(begin, backend, part_of(settings, groups))
        freezing.freeze(model, settings.training.trainable)
        engine = _engine(model, settings, backend, groups)
        if found:
            checkpoint.load_engine(found, engine)
    if leader:
        environment = _environment(begin, backend, groups, model)
        environment["resumed_from"] = str(found.path) if found else None
        run_folder.write(run_dir, settings, backend.engine, environment, resume)
    run_folder.require_shared(run_dir)
    report(f"{backend.describe()} layout={groups.layout()} {model.ops.description}")
    _describe(settings, backend, data, report)
    report(f"{'resuming after step ' + str(first_step) if found else 'starting'}: {run_dir}")
    pipeline = Pipeline(model, groups, settings.parallel.schedule)
    draw = _drawer(settings, pipeline) if settings.training.sample_every and groups.data_rank == 0 else None
    spikes = Spikes(settings.training.spike_sigma, norms=settings.training.on_spike == "skip")
    spikes.restore(found.manifest.get("training", {}) if found else {})
    loss, requests = provide_loss(settings), _save_requests(settings, first_step, leader)
    run = Run(settings, pipeline, engine, data, loss, groups, backend, draw, spikes, verification, requests)
    run = dataclasses.replace(run, fence=lock.require)
    require_sound_state(run, first_step)
    verification.go_on(f"Checkpoints after step {first_step} may have been trained on such bytes")
    request = train(run, first_step)
    verification.close()
    for line in verification.summary() if leader and not request else ():
        say(line)
    # Not after an error: other ranks may wait in a collective, and NCCL would wait for them before the error shows.
    mark("ending")
    dist.destroy_process_group()
    lock.release()
    return settings, request


def _resolved(settings: Config, resume: bool) -> tuple[Config, Backend]:
    """What runs, where; every refusal that needs no other rank comes from here."""
    require_stores(settings.data)
    settings = with_data_sizes(run_folder.with_recorded(settings) if resume else settings)
    backend = Backend.resolve(settings)
    settings = dataclasses.replace(settings, runtime=dataclasses.replace(settings.runtime, dtype=backend.dtype_name))
    config_rules.validate(settings, backend.world_size)
    freezing.require_work_for_all(settings)
    run_dir = Path(settings.run.dir)
    run_lock.require_free(run_dir)
    run_folder.check(run_dir, settings, resume)
    if settings.model.pretrained and not checkpoint.committed(run_dir / "checkpoints"):
        pretrained.require_fit(settings)
    return settings, backend


def _newest_checkpoint(run_dir: Path, report: Callable[[str], None]) -> checkpoint.Checkpoint | None:
    """The checkpoint to continue from; None where the run has none yet. Collective; RunError where all are damaged."""
    with waiting(f"checking the checkpoints of {run_dir}", dist.get_rank() == 0):
        found = checkpoint.latest(run_dir / "checkpoints", report)
    if not found and checkpoint.committed(run_dir / "checkpoints"):
        raise RunError(
            f"{run_dir}/checkpoints: every checkpoint is damaged or not finite; to start over, choose another run.dir"
        )
    return found


def _provided(provide: Callable[[], Data]) -> Data:
    """What ``provide`` returns; raises on all ranks what is wrong with the data of any. Collective."""
    data, problem = None, None
    try:
        data = provide()
    except DataFileError as error:
        problem = error
    require_data(problem)
    return data


def _verification(data: Data, run_dir: Path, first_step: int, backend: Backend) -> Verification:
    """The first blocks of the data are compared with their digests; raises on all ranks where one differs."""
    touched = functools.partial(data.touched, first_step)
    verification = Verification(data.stores, touched, run_dir, backend.rank, backend.world_size)
    with waiting("comparing the data with its digests", backend.rank == 0):
        verification.begin()
    require_data(verification.problem)
    return verification


def _describe(settings: Config, backend: Backend, data: Data, report: Callable[[str], None]) -> None:
    """Say how large the model and the data are, and what about them a user would want to change."""
    report(f"model: {parameters_in_words(settings)}")
    if backend.computes_in_software():
        report(
            "this processor computes bfloat16 in software: a new run with runtime.dtype=float32 is many times faster"
        )
    for prefix, (rows, cut, needed) in data.captions.items():
        fits = f", {cut:,} captions cut: data.sequence_length={needed} would hold all" if cut else ""
        report(f"{prefix}: {count(rows, 'row')} of {settings.data.sequence_length} positions{fits}")


def parameters_in_words(settings: Config) -> str:
    """How many parameters the model has, and how many of them learn."""
    total = model_parameters(settings.model, settings.vocab_layout.size)
    trained = freezing.trained_parameters(settings)
    return f"{total:,} parameters" + (f", {trained:,} of them trained" if trained != total else "")


def _environment(settings: Config, backend: Backend, groups: ParallelGroups, model: GPT) -> dict:
    """What ``environment.json`` says of this launch."""
    return {
        "backend": backend.describe(),
        "ops": model.ops.description,
        "engine": backend.engine,
        "layout": groups.layout(),
        "parameters_total": model_parameters(settings.model, settings.vocab_layout.size),
        "parameters_per_rank": sum(p.numel() for p in model.parameters()),
        "parameters_trained": freezing.trained_parameters(settings),
        "pretrained": pretrained.digests(settings.model.pretrained) if settings.model.pretrained else None,
    }


def _without_pretrained(settings: Config) -> Config:
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, pretrained=None))


def _engine(model: GPT, settings: Config, backend: Backend, groups: ParallelGroups) -> Engine:
    if backend.engine == "torch":
        return TorchEngine(model, settings.optimizer, settings.training, groups)
    from megat2i.optim.deepspeed_engine import DeepSpeedEngine  # slow to import, and only some runs need it

    return DeepSpeedEngine(model, settings.optimizer, settings.training, groups, backend.local_rank)


def _save_requests(settings: Config, first_step: int, leader: bool) -> SaveRequests:
    parameters = model_parameters(settings.model, settings.vocab_layout.size)
    run_dir = Path(settings.run.dir) if leader else None
    if run_dir:
        forget_end(run_dir)  # of the last launch
    return SaveRequests(run_dir, BYTES_PER_PARAMETER * parameters, first_step)


def _drawer(settings: Config, pipeline: Pipeline) -> Callable[[], np.ndarray]:
    """Draws the configured prompts with the model as it is, always from the same seeds."""

    @functools.cache
    def sampler() -> Sampler:  # at the first use: the leader has written the tokenizers by then
        return Sampler.for_model(settings, pipeline)

    prompts = settings.sampling.prompts
    return lambda: sampler().images(prompts, [0] * len(prompts), settings.sampling)
