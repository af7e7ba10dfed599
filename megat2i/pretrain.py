"""Starts a training run: backend, run folder, model, engine and data, then ``trainer.train``.

What the model, the data and the loss are is given by the three providers of the entry script.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megat2i import checkpoint, config_rules, run_folder
from megat2i.config import Config
from megat2i.data.manifest import Manifest
from megat2i.generate import Sampler
from megat2i.loss import ModalityLoss
from megat2i.model import freezing, pretrained
from megat2i.model.cost import model_parameters
from megat2i.model.gpt import GPT
from megat2i.model.part import Part, part_of
from megat2i.optim.engine import Engine
from megat2i.optim.torch_engine import TorchEngine
from megat2i.pipeline import Pipeline
from megat2i.runtime import Backend
from megat2i.self_test import require_same_launch, self_test
from megat2i.topology import ParallelGroups
from megat2i.trainer import Data, Run, RunError, require_equal_copies, train

Providers = tuple[
    Callable[[Config, Backend, Part], GPT],
    Callable[[Config, Backend, ParallelGroups], Data],
    Callable[[Config], ModalityLoss],
]


def pretrain(settings: Config, resume: bool, providers: Providers) -> None:
    """Train to the end of the schedule or to ``training.stop_at``; collective over all ranks of the launch."""
    settings = with_vocabulary(settings)
    backend = Backend.resolve(settings)
    config_rules.validate(settings, backend.world_size)
    freezing.require_work_for_all(settings)
    run_dir = Path(settings.run.dir)
    run_folder.check(run_dir, settings, resume)
    if settings.model.pretrained and not checkpoint.committed(run_dir / "checkpoints"):
        pretrained.require_fit(settings)
    backend.start(settings.model.seed)
    groups = ParallelGroups.create(settings.parallel)
    if settings.runtime.self_test and backend.world_size > 1:
        require_same_launch(settings, run_folder.data_identity(settings))
        self_test(settings, backend, groups, _engine)
    provide_model, provide_data, provide_loss = providers
    data = provide_data(settings, backend, groups)
    leader = backend.rank == 0
    report = print if leader else lambda line: None
    found = checkpoint.latest(run_dir / "checkpoints", report) if resume else None
    if resume and not found and checkpoint.committed(run_dir / "checkpoints"):
        raise RunError(f"{run_dir}/checkpoints: every checkpoint is damaged; to start over, choose another run.dir")
    # a checkpoint replaces every weight: the pre-trained model need not be there any more
    begin = _without_pretrained(settings) if found else settings
    model = provide_model(begin, backend, part_of(settings, groups))
    freezing.freeze(model, settings.training.trainable)
    engine = _engine(model, settings, backend, groups)
    if found:
        checkpoint.load_engine(found, engine)
    first_step = found.step if found else 0
    if leader:
        environment = {
            "backend": backend.describe(),
            "ops": model.ops.description,
            "engine": backend.engine,
            "layout": groups.layout(),
            "parameters_total": model_parameters(settings.model, settings.vocab_layout.size),
            "parameters_per_rank": sum(p.numel() for p in model.parameters()),
            "parameters_trained": freezing.trained_parameters(settings),
            "resumed_from": str(found.path) if found else None,
            "pretrained": pretrained.digests(begin.model.pretrained) if begin.model.pretrained else None,
        }
        run_folder.write(run_dir, settings, backend.engine, environment)
    run_folder.require_shared(run_dir)
    report(f"{backend.describe()} layout={groups.layout()} {model.ops.description}")
    for prefix, (rows, cut) in data.captions.items():
        report(f"{prefix}: {rows:,} rows, {cut:,} captions cut to fit {settings.data.sequence_length} positions")
    report(f"{'resuming after step ' + str(first_step) if found else 'starting'}: {run_dir}")
    pipeline = Pipeline(model, groups, settings.parallel.schedule)
    draw = _drawer(settings, pipeline) if settings.training.sample_every and groups.data_rank == 0 else None
    run = Run(settings, pipeline, engine, data, provide_loss(settings), groups, backend, draw)
    if settings.runtime.self_test:
        require_equal_copies(run)
    train(run, first_step)
    # Not after an error: other ranks may wait in a collective, and NCCL would wait for them before the error shows.
    dist.destroy_process_group()


def with_vocabulary(settings: Config) -> Config:
    """The settings with the vocabulary sizes that were left to the manifest of the first dataset."""
    manifest = Manifest.read(settings.data.train[0].prefix) if settings.data.train else None
    text, image = (manifest.text, manifest.image) if manifest else (None, None)
    vocab = settings.vocab
    if vocab.text_tokens is None and text:
        vocab = dataclasses.replace(vocab, text_tokens=text.vocab_size)
    if vocab.image_codes is None and image:
        vocab = dataclasses.replace(vocab, image_codes=image.codebook_size)
    return dataclasses.replace(settings, vocab=vocab)


def _without_pretrained(settings: Config) -> Config:
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, pretrained=None))


def _engine(model: GPT, settings: Config, backend: Backend, groups: ParallelGroups) -> Engine:
    if backend.engine == "torch":
        return TorchEngine(model, settings.optimizer, settings.training, groups)
    from megat2i.optim.deepspeed_engine import DeepSpeedEngine  # slow to import, and only some runs need it

    return DeepSpeedEngine(model, settings.optimizer, settings.training, groups, backend.local_rank)


def _drawer(settings: Config, pipeline: Pipeline) -> Callable[[], np.ndarray]:
    """Draws the configured prompts with the model as it is, always from the same seeds."""

    @functools.cache
    def sampler() -> Sampler:  # at the first use: the leader has written the tokenizers by then
        return Sampler.for_model(settings, pipeline)

    prompts = settings.sampling.prompts
    return lambda: sampler().images(prompts, [0] * len(prompts), settings.sampling)
