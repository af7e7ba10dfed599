"""Proof, before training starts, that this launch computes what one rank computes.

A tiny model runs on the run's own process groups, once along each axis and once along all of them with the run's own
engine; every rank works out the right answer by itself and compares its part. A wrong driver, library or network shows
here in seconds, not as a loss that is a little too high for a week.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megat2i import config
from megat2i.config import Config, VocabConfig
from megat2i.data.batches import Batch
from megat2i.kernels import choose_ops
from megat2i.loss import ModalityLoss, count_tokens
from megat2i.model.freezing import freeze
from megat2i.model.gpt import GPT
from megat2i.model.part import WHOLE_MODEL, Part, part_of
from megat2i.optim.engine import WEIGHT, Engine
from megat2i.pipeline import Pipeline
from megat2i.progress_marks import mark
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import RunError, train_step
from megat2i.vocab import IGNORE

# Of a tensor's norm, and in bfloat16 of the whole update: roundings of a tiny model, far below a lost or doubled part.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
LR = 1.0  # a large update, against the rounding of the weights that it is added to
ROWS = 2  # of a micro-batch
MakeEngine = Callable[[GPT, Config, Backend, ParallelGroups], Engine]


def require_same_launch(settings: Config, data: dict) -> None:
    """Raises RunError on all ranks where one runs other code, another configuration or on other data than rank 0."""
    mark("self-test")
    package = Path(__file__).resolve().parent
    code = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.parent.glob("kernels/**/*.py")]):
        code.update(path.read_bytes())
    code.update(Path(sys.argv[0]).read_bytes() if Path(sys.argv[0]).is_file() else b"")  # the entry script
    code.update(" ".join(f"{name} {_version(name)}" for name in ("torch", "deepspeed", "triton", "numpy")).encode())
    contents = (code.digest(), config.to_yaml(settings).encode(), json.dumps(data, sort_keys=True).encode())
    digests = b"".join(hashlib.sha256(content).digest() for content in contents)
    own = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(1, 3, -1).to(_device())
    everyone = own.new_empty((dist.get_world_size(), *own.shape[1:]))
    dist.all_gather_into_tensor(everyone, own)
    for number, what in enumerate(("code", "configuration", "data")):
        other = (everyone[:, number] != everyone[0, number]).any(dim=-1).nonzero().flatten().tolist()
        if other:
            raise RunError(
                f"ranks {other} have other {what} than rank 0: bring the same files to every node and start again"
            )


def self_test(settings: Config, backend: Backend, groups: ParallelGroups, make_engine: MakeEngine) -> None:
    """Raises RunError on all ranks, naming the axis, where the tiny model comes out differently. Collective."""
    test = _SelfTest(tiny_settings(settings, groups), backend, groups)
    axes = (("tensor", test.tensor_axis), ("pipeline", test.pipeline_axis), ("data", test.data_axis))
    for axis, check in axes:
        _require(axis, check(), TOLERANCE[torch.float32])
    _require("combined", test.all_axes(make_engine, torch.float32, "float32"), TOLERANCE[torch.float32])
    if backend.dtype != torch.float32:  # other kernels and, in DeepSpeed, another optimizer
        error = test.all_axes(make_engine, backend.dtype, settings.optimizer.reduce_dtype)
        _require("combined", error, TOLERANCE[backend.dtype])


def tiny_settings(settings: Config, groups: ParallelGroups) -> Config:
    """The run's own layout, engine and kind of layers around the smallest model that they divide."""
    tensor, model = groups.tensor_size, settings.model
    grouped = model.key_value_heads < model.heads
    heads, length = 2 * tensor if grouped else max(2, tensor), max(16, tensor)
    stages = groups.pipeline_size * settings.parallel.virtual_stages
    batch = ROWS * groups.data_size * 2 * groups.pipeline_size
    return replace(
        settings,
        model=replace(  # everything but the sizes is the run's, so that a new kind of layer is tested too
            model,
            hidden=8 * heads,
            layers=stages + 1,
            heads=heads,
            ffn=8 * heads,
            kv_heads=tensor if grouped else None,
            head_width=None,
            pretrained=None,
        ),
        vocab=VocabConfig(text_tokens=249, image_codes=256),
        data=replace(settings.data, sequence_length=length),
        training=replace(settings.training, global_batch_size=batch, micro_batch_size=ROWS),
        # with a large epsilon Adam's first update is proportional to the gradient, so that a wrong scale shows
        optimizer=replace(settings.optimizer, eps=1.0, weight_decay=0.0, clip=0.0, reduce_dtype="float32"),
    )


class _SelfTest:
    """The answer of one rank, and the same along every axis. Each check returns (error, what differs most)."""

    def __init__(self, settings: Config, backend: Backend, groups: ParallelGroups):
        self.settings, self.backend, self.groups = settings, backend, groups
        self.loss = ModalityLoss((1.0, 1.0, 1.0), 1e-3)
        self.batches = _batches(settings, backend.device)
        self.counts = count_tokens([batch.modality for batch in self.batches])
        model = self._model(WHOLE_MODEL)
        self._accumulate(model, self.batches)
        self.gradients = _gradients(model)

    def tensor_axis(self) -> tuple[float, str]:
        parallel = part_of(self.settings, self.groups).parallel
        model = self._model(Part(parallel, recompute=self.settings.parallel.recompute))
        self._accumulate(model, self.batches)
        return self._largest(model, _gradients(model), self.gradients)

    def pipeline_axis(self) -> tuple[float, str]:
        model = self._model(Part(stages=part_of(self.settings, self.groups).stages))
        pipeline = Pipeline(model, self.groups, self.settings.parallel.schedule)
        pipeline.run_schedule(self.batches, self.loss, self.counts, 1.0)
        return self._largest(model, _gradients(model), self.gradients)

    def data_axis(self) -> tuple[float, str]:
        model = self._model(WHOLE_MODEL)
        self._accumulate(model, self._own_batches())
        found = _gradients(model)
        for gradient in found.values():
            dist.all_reduce(gradient, group=self.groups.data)
        return self._largest(model, found, self.gradients)

    def all_axes(self, make_engine: MakeEngine, dtype: torch.dtype, reduce_dtype: str) -> tuple[float, str]:
        norm = torch.nn.utils.get_total_norm(list(self.gradients.values())).item()
        optimizer = replace(self.settings.optimizer, clip=norm / 2, reduce_dtype=reduce_dtype)
        model = self._model(part_of(self.settings, self.groups), dtype)
        settings, backend = replace(self.settings, optimizer=optimizer), replace(self.backend, dtype=dtype)
        engine = make_engine(model, settings, backend, self.groups)
        masters = [fragment for fragment in engine.fragments() if fragment.kind == WEIGHT]
        before = [fragment.values.clone() for fragment in masters]
        pipeline = Pipeline(model, self.groups, self.settings.parallel.schedule)
        _, found = train_step(pipeline, engine, self._own_batches(), self.loss, self.groups, LR)
        clipped = {name: gradient / 2 for name, gradient in self.gradients.items()}
        updates = {name: -LR * gradient / (gradient.abs() + 1.0) for name, gradient in clipped.items()}
        whole = torch.nn.utils.get_total_norm(list(updates.values())).item()
        errors = [(_finite(abs(found - norm) / norm), "the gradient norm")]
        for fragment, old in zip(masters, before, strict=True):
            right = 0.0  # of what does not learn
            if fragment.name in updates:
                right = fragment.shard.cut(updates[fragment.name]).flatten()[fragment.start :][: len(old)]
            error = (fragment.values - old - right).norm().item() / whole
            errors.append((_finite(error), f"the update of {fragment.name}"))
        return max(errors)

    def _model(self, part: Part, dtype: torch.dtype = torch.float32) -> GPT:
        settings, device = self.settings, self.backend.device
        ops = choose_ops(device, dtype)
        model = GPT.empty(settings.model, settings.vocab_layout, ops, device, dtype, part)
        model.initialise(seed=0)
        freeze(model, settings.training.trainable)
        return model

    def _accumulate(self, model: GPT, batches: list[Batch]) -> None:
        for batch in batches:
            weight = self.loss.token_weight(batch.modality, self.counts)
            self.loss.objective(model(batch.tokens, batch.labels, weight, self.loss.z_loss), 1.0).backward()

    def _own_batches(self) -> list[Batch]:
        share = len(self.batches) // self.groups.data_size
        return self.batches[self.groups.data_rank * share :][:share]

    def _largest(self, model: GPT, found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
        """The largest difference of this rank's parts, in units of each part's own norm, and where it is."""
        shards, errors = model.shards(), []
        for name, tensor in found.items():
            right = shards[name].cut(expected[name])
            unit = max(right.norm().item(), 1e-3 * expected[name].norm().item())
            errors.append((_finite((tensor - right).norm().item() / unit), f"the gradient of {name}"))
        return max(errors)


def _gradients(model: GPT) -> dict[str, Tensor]:
    """Of the parameters that learn."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def _finite(error: float) -> float:
    """Not a number is the largest of errors."""
    return error if math.isfinite(error) else math.inf


def _batches(settings: Config, device: torch.device) -> list[Batch]:
    """The micro-batches of all ranks, with another share of image tokens and ignored ones in each."""
    layout, length = settings.vocab_layout, settings.data.sequence_length
    generator = torch.Generator().manual_seed(0)
    batches = []
    count = settings.training.global_batch_size // ROWS
    for number in range(count):
        tokens = torch.randint(0, layout.text_tokens, (ROWS, length), generator=generator)
        image = torch.rand(tokens.shape, generator=generator) < (number + 1) / (count + 1)
        tokens[image] = tokens[image] + layout.image_start
        labels = tokens.roll(-1, dims=1)
        labels[:, -1 - number % 3 :] = IGNORE
        modality = torch.from_numpy(layout.modality(labels.numpy()))
        batches.append(Batch(tokens, labels, modality, [], 0).to(device))
    return batches


def _require(axis: str, result: tuple[float, str], tolerance: float) -> None:
    error, what = result
    worst = torch.tensor([error], dtype=torch.float64, device=_device())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if worst.item() <= tolerance:
        return
    where = f"rank {dist.get_rank()} sees it in {what}" if error == worst.item() else "seen on another rank"
    axis = "axes together" if axis == "combined" else f"{axis}-parallel axis"
    raise RunError(
        f"start-up self-test: on the {axis} a tiny model differs from one rank's by {worst.item():.1e} of the norm "
        f"(allowed {tolerance:.0e}; {where}). Training would be wrong without a message. Check that all ranks run the "
        "same software on sound hardware; runtime.self_test=false skips this test"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
