"""Time and memory of a training step under every kind of activation recomputation, in one run.

``python benchmarks/bench_recompute.py [--json FILE]`` makes optimizer steps of one model with ``parallel.recompute`` of
none, selective and full in turn. Memory is what the autograd graph of a micro-batch keeps for its backward pass, every
storage counted once, weights left out: the same bytes on any device. "full" is what
``torch.utils.checkpoint`` around every block does.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from harness import Record, parser_for

from megat2i import config
from megat2i.data.batches import Batch
from megat2i.kernels import choose_ops
from megat2i.loss import ModalityLoss
from megat2i.model.gpt import GPT
from megat2i.model.part import Part
from megat2i.optim.torch_engine import TorchEngine
from megat2i.pipeline import Pipeline
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import train_step
from megat2i.vocab import IGNORE

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("none", "selective", "full")


def main() -> None:
    """Time the kinds in turn; print medians, spread, bytes and the ratios to no recomputation."""
    parser = parser_for(__doc__, minutes=False)
    parser.add_argument("--config", default=str(ROOT / "configs/openmoji_demo.yaml"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    settings = config.load(arguments.config, arguments.overrides)
    settings = dataclasses.replace(
        settings,
        training=dataclasses.replace(settings.training, global_batch_size=settings.training.micro_batch_size),
    )
    backend = Backend.resolve(settings)
    backend.start(seed=0)
    groups = ParallelGroups.create(settings.parallel)
    batch = random_batch(settings).to(backend.device)
    steps, held = {}, {}
    for kind in KINDS:
        model = make_model(settings, backend, kind)
        held[kind] = held_bytes(model, batch)
        steps[kind] = make_step(model, settings, groups, batch)
    seconds = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds + 1):  # the first round warms up
        for kind, step in steps.items():
            started = time.perf_counter()
            step()
            if backend.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[kind].append(time.perf_counter() - started)
    dist.destroy_process_group()
    report(seconds, held, batch.tokens.numel(), settings, Record("recompute", arguments.json, backend.device))


def report(seconds: dict, held: dict, tokens: int, settings: config.Config, record: Record) -> None:
    """Prints the table and records it."""
    rows = {}
    for kind in KINDS:
        ratios = [a / b for a, b in zip(seconds[kind], seconds["none"], strict=True)]
        row = {
            "step_s": statistics.median(seconds[kind]),
            "time_ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            "held_bytes": held[kind],
            "memory_ratio": held[kind] / held["none"],
        }
        rows[kind] = row
        print(
            f"{kind:16} {row['step_s']:8.3f} s  x{row['time_ratio'][0]:.2f} ({min(ratios):.2f} to {max(ratios):.2f})  "
            f"{held[kind] / 2**20:9.1f} MiB held  x{row['memory_ratio']:.2f}"
        )
    record.add(f"{tokens:,} tokens, width {settings.model.hidden:,}, {settings.model.layers} layers", rows)
    record.finish()


def random_batch(settings: config.Config) -> Batch:
    """A micro-batch of random image ids."""
    layout, generator = settings.vocab_layout, torch.Generator().manual_seed(0)
    shape = (settings.training.micro_batch_size, settings.data.sequence_length)
    tokens = torch.randint(settings.vocab.image_codes, shape, generator=generator) + layout.image_start
    labels = torch.cat((tokens[:, 1:], torch.full((shape[0], 1), IGNORE)), dim=1)
    return Batch(tokens, labels, torch.from_numpy(layout.modality(labels.numpy())), samples=[], text_cut=0)


def make_model(settings: config.Config, backend: Backend, kind: str) -> GPT:
    """A model that recomputes in the way of ``kind``."""
    ops = choose_ops(backend.device, backend.dtype)
    model = GPT.empty(settings.model, settings.vocab_layout, ops, backend.device, backend.dtype, Part(recompute=kind))
    model.initialise(seed=0)
    return model


def held_bytes(model: GPT, batch: Batch) -> int:
    """Bytes that the graph of one forward pass keeps, without the loss head, which is the same for all."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (stage,) = model.stages
        model.run_stage(stage, batch.tokens, None)
    return sum(storages.values())


def make_step(model: GPT, settings: config.Config, groups: ParallelGroups, batch: Batch):
    """A function that makes one optimizer step."""
    engine = TorchEngine(model, settings.optimizer, settings.training, groups)
    pipeline, loss = Pipeline(model, groups), ModalityLoss((1.0, 1.0, 1.0))
    return lambda: train_step(pipeline, engine, [batch], loss, groups, lr=1e-4)


if __name__ == "__main__":
    main()
