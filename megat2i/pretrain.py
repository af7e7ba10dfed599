"""Starts a training run: backend, run folder, model, engine and data, then ``trainer.train``.

What the model, the data and the loss are is given by the three providers of the entry script.
"""

import dataclasses
import hashlib
import json
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megat2i import checkpoint, config
from megat2i.config import Config
from megat2i.data.files import DataFileError, PendingFile, commit
from megat2i.data.manifest import Manifest
from megat2i.generate import Sampler
from megat2i.loss import ModalityLoss
from megat2i.model.gpt import GPT
from megat2i.optim.engine import Engine
from megat2i.optim.torch_engine import TorchEngine
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import Data, Run, RunError, train

Providers = tuple[
    Callable[[Config, Backend], GPT],
    Callable[[Config, Backend, ParallelGroups], Data],
    Callable[[Config], ModalityLoss],
]


def pretrain(settings: Config, resume: bool, providers: Providers) -> None:
    """Train to the end of the schedule or to ``training.stop_at``; collective over all ranks of the launch."""
    settings = _with_vocabulary(settings)
    backend = Backend.resolve(settings)
    config.validate(settings, backend.world_size)
    run_dir = Path(settings.run.dir)
    _check_run_folder(run_dir, settings, resume)
    backend.start(settings.model.seed)
    try:
        groups = ParallelGroups.create(settings.parallel, backend.device.type)
        provide_model, provide_data, provide_loss = providers
        data = provide_data(settings, backend, groups)
        model = provide_model(settings, backend)
        engine = _engine(model, settings, backend, groups)
        leader = backend.rank == 0
        report = print if leader else lambda line: None
        found = checkpoint.latest(run_dir / "checkpoints", report) if resume else None
        if found:
            checkpoint.load_engine(found, engine)
        elif resume and checkpoint.committed(run_dir / "checkpoints"):
            raise RunError(f"{run_dir}/checkpoints: every checkpoint is damaged; to start over, choose another run.dir")
        first_step = found.step if found else 0
        if leader:
            _write_records(run_dir, settings, backend, groups, model, engine, found)
        report(f"{backend.describe()} {model.ops.description}")
        for prefix, (rows, cut) in data.captions.items():
            report(f"{prefix}: {rows:,} rows, {cut:,} captions cut to fit {settings.data.sequence_length} positions")
        report(f"{'resuming after step ' + str(first_step) if found else 'starting'}: {run_dir}")
        draw = _drawer(settings, model) if settings.training.sample_every and leader else None
        run = Run(settings, model, engine, data, provide_loss(settings), groups, backend.device, draw)
        train(run, first_step)
    finally:
        dist.destroy_process_group()


def _with_vocabulary(settings: Config) -> Config:
    """The settings with the vocabulary sizes that were left to the manifest of the first dataset."""
    manifest = Manifest.read(settings.data.train[0].prefix) if settings.data.train else None
    text, image = (manifest.text, manifest.image) if manifest else (None, None)
    vocab = settings.vocab
    if vocab.text_tokens is None and text:
        vocab = dataclasses.replace(vocab, text_tokens=text.vocab_size)
    if vocab.image_codes is None and image:
        vocab = dataclasses.replace(vocab, image_codes=image.codebook_size)
    return dataclasses.replace(settings, vocab=vocab)


def _engine(model: GPT, settings: Config, backend: Backend, groups: ParallelGroups) -> Engine:
    if backend.engine == "torch":
        return TorchEngine(model, settings.optimizer, groups)
    from megat2i.optim.deepspeed_engine import DeepSpeedEngine  # slow to import, and only some runs need it

    return DeepSpeedEngine(model, settings.optimizer, settings.training, groups)


def _drawer(settings: Config, model: GPT) -> Callable[[], np.ndarray]:
    """Draws the configured prompts with the model as it is, always from the same seeds."""
    sampler, prompts = Sampler.for_model(settings, model), settings.sampling.prompts
    return lambda: sampler.images(prompts, [0] * len(prompts), settings.sampling, batch_size=len(prompts))


def _copy_tokenizers(run_dir: Path, settings: Config) -> None:
    """Keep the tokenizers of the data with the run, so that it can be sampled wherever it is moved."""
    prefix = settings.data.train[0].prefix
    manifest = Manifest.read(prefix)
    for name in ("text", "image") if manifest else ():
        content = getattr(manifest, name)
        if content is None:
            continue
        source = Path(prefix).parent / content.tokenizer
        if not source.is_file():
            raise DataFileError(source, f"the {name} tokenizer of {prefix} is missing", "Put it back beside the data")
        data = source.read_bytes()
        if hashlib.sha256(data).hexdigest() != content.sha256:
            raise DataFileError(source, f"is not the {name} tokenizer that wrote {prefix}", "Restore the original file")
        target = run_dir / "tokenizers" / name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file = PendingFile(target)
        file.write(data)
        commit([file])


def _check_run_folder(run_dir: Path, settings: Config, resume: bool) -> None:
    """Nothing that a run wrote is overwritten, and a resumed run is the same run."""
    saved = run_dir / "config.yaml"
    if not resume:
        if (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists():
            raise RunError(f"{run_dir} holds a run already: continue it with --resume, or choose another run.dir")
        return
    if not saved.exists():
        raise RunError(f"{saved} does not exist: there is no run to resume in {run_dir}; start without --resume")
    changes = config.changed_identity(config.load(saved), settings)
    if changes:
        raise RunError(
            f"{run_dir} was started with other settings, so --resume would not continue it: {'; '.join(changes)}. "
            "Give the settings of the run, or start a new one in another run.dir"
        )


def _write_records(run_dir: Path, settings: Config, backend: Backend, groups, model, engine, found) -> None:
    """``config.yaml`` (resolved) and ``environment.json``."""
    parameters = sum(p.numel() for p in model.parameters())
    environment = {
        "backend": backend.describe(),
        "ops": model.ops.description,
        "engine": backend.engine,
        "layout": groups.layout(),
        "parameters_total": parameters,
        "parameters_per_rank": parameters,
        "resumed_from": str(found.path) if found else None,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("megat2i", "torch", "deepspeed", "triton", "numpy")},
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    _copy_tokenizers(run_dir, settings)
    resolved = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, engine=backend.engine))
    files = []
    for name, text in (
        ("config.yaml", config.to_yaml(resolved)),
        ("environment.json", json.dumps(environment, indent=1) + "\n"),
    ):
        files.append(PendingFile(run_dir / name))
        files[-1].write(text.encode())
    commit(files)


def _git_commit() -> str | None:
    """Commit of the source tree, with "+changes" where it was edited; None outside a checkout."""
    source = Path(__file__).resolve().parent
    try:
        commit_id = subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=source, text=True, stderr=subprocess.DEVNULL
        )
        changes = subprocess.check_output(["git", "status", "--porcelain"], cwd=source, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit_id.strip() + ("+changes" if changes.strip() else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
