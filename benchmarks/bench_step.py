"""A whole training step of a configuration: ours, the same model in plain PyTorch with torch.compile, and with Liger.

    python benchmarks/bench_step.py [section.key=value ...] [--json FILE] [--config FILE] [--micro-batch M ...]
        [--only NAME ...]

All contestants are the same model, weights and rows, trained by our own ``train_step`` and engine on one device, one
micro-batch a step; they differ in the operations of the blocks, in the loss head, in what torch.compile is given (every
block by itself) and in what is computed again. Each is built, timed and freed in turn, as memory holds one. The norm of
the first gradient shows that they do the same work. Every position but a row's last has a label, so no head gains by
leaving pads out. MFU by the FLOPs of ``megat2i.model.cost``; the break-down of a step by part is the profiler's.
"""

import argparse
import dataclasses
import gc
import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from harness import installed, one_time, save
from step_parts import PARTS, parts_of_step
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn import functional as F

from megat2i import config
from megat2i.data.batches import Batch
from megat2i.kernels import Ops, TokenLosses, choose_ops
from megat2i.kernels.linear_cross_entropy.columns import local_pieces, local_rows
from megat2i.loss import ModalityLoss
from megat2i.metrics import peak_flops
from megat2i.model.cost import flops_per_token
from megat2i.model.gpt import GPT
from megat2i.model.part import Part
from megat2i.optim.torch_engine import TorchEngine
from megat2i.pipeline import Pipeline
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import train_step
from megat2i.vocab import IGNORE

ROOT = Path(__file__).resolve().parent.parent


class Contestant(NamedTuple):
    """``block``: ours | pytorch | liger; ``head``: ours | full logits | liger; ``compiled``: blocks and full logits."""

    block: str = "ours"
    head: str = "ours"
    compiled: bool = False
    recompute: str = "none"


CONTESTANTS = {
    "ours": Contestant(),
    "ours, selective recomputation": Contestant(recompute="selective"),
    "ours, full recomputation": Contestant(recompute="full"),
    "ours, blocks compiled": Contestant(compiled=True),
    "PyTorch blocks compiled, our head": Contestant(block="pytorch", compiled=True),
    "PyTorch compiled, full logits": Contestant("pytorch", "full logits", compiled=True),
    "PyTorch, full logits": Contestant("pytorch", "full logits"),
    "Liger": Contestant("liger", "liger"),
}


def main() -> None:
    """Run every contestant at every size of micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    default = "configs/open_lm_1b_t2i.yaml" if cuda else "configs/openmoji_demo.yaml"
    parser.add_argument("--config", default=str(ROOT / default))
    parser.add_argument("--micro-batch", type=int, nargs="*", default=[8, 16] if cuda else [4], help="rows")
    parser.add_argument("--only", nargs="*", choices=tuple(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15 if cuda else 5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    sections, backend = {}, None
    for rows in arguments.micro_batch:
        size = [f"training.micro_batch_size={rows}", f"training.global_batch_size={rows}"]
        settings = config.load(arguments.config, [*arguments.overrides, *size])
        if backend is None:
            backend = Backend.resolve(settings)
            backend.start(seed=0)
        groups = ParallelGroups.create(settings.parallel)
        print(f"\n{rows} rows of {settings.data.sequence_length:,}, {backend.describe()}\n{header()}")
        for name in arguments.only:
            row = measure(CONTESTANTS[name], settings, backend, groups, arguments.rounds)
            print(table_line(name, row))
            sections[f"{name}, {rows} rows"] = row
    device = backend.device
    dist.destroy_process_group()
    save(arguments.json, device, sections)


def measure(who: Contestant, settings: config.Config, backend: Backend, groups: ParallelGroups, rounds: int) -> dict:
    """Figures of one contestant; its error instead where it fails, so that the others still run."""
    if "liger" in who[:2] and (backend.device.type != "cuda" or not installed("liger_kernel")):
        return {"error": "needs a GPU and liger-kernel"}
    try:
        row = figures(who, settings, backend, groups, rounds)
    except Exception as error:  # out of memory, or a rival's own way to fail; the table says how
        row = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"}
    torch._dynamo.reset()
    gc.collect()  # hooks of parameters are cycles; the next contestant needs the memory
    if backend.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def figures(who: Contestant, settings: config.Config, backend: Backend, groups: ParallelGroups, rounds: int) -> dict:
    """Times in milliseconds, speed, memory, the first gradient's norm and milliseconds by part."""
    step, norm = make_step(who, settings, backend, groups)
    step()
    peak = peak_memory(step, backend.device)
    times = [one_time(step, backend.device) for _ in range(rounds)]
    parts = parts_of_step(step, backend.device)
    length = settings.data.sequence_length
    tokens = settings.training.micro_batch_size * (length - 1)
    columns = sum(stop - start for start, stop in settings.vocab_layout.ranges)
    speed = 1000 * tokens / statistics.median(times)
    flops = speed * flops_per_token(settings.model, columns, length)
    best = peak_flops(backend.device, backend.dtype)
    return {
        "ms": statistics.median(times),
        "min": min(times),
        "max": max(times),
        "tokens_per_s": speed,
        "tflops": flops / 1e12,
        "mfu": flops / best if best else None,
        "peak_mb": peak,
        "grad_norm": norm,
        "parts": parts,
    }


def peak_memory(step: Callable, device: torch.device) -> float | None:
    """Megabytes held at the peak of a step, weights and optimizer included; None on a CPU, where they stay cached."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 1e6


def make_step(who: Contestant, settings: config.Config, backend: Backend, groups: ParallelGroups):
    """(a function that makes one optimizer step, the gradient's norm at the first one, which is made here)."""
    ops = operations(who, backend)
    part = Part(recompute=who.recompute)
    model = GPT.empty(settings.model, settings.vocab_layout, ops, backend.device, backend.dtype, part)
    model.initialise(seed=0)
    if who.compiled:
        for block in model.layers.values():
            block.compile()
    engine = TorchEngine(model, settings.optimizer, settings.training, groups)
    pipeline, loss = Pipeline(model, groups), ModalityLoss((1.0, 1.0, 1.0))
    batch = random_batch(settings).to(backend.device)
    engine.step = named("optimizer", engine.step)

    def step() -> float:
        return train_step(pipeline, engine, [batch], loss, groups, lr=1e-4)[1]

    return step, step()


def random_batch(settings: config.Config) -> Batch:
    """A micro-batch of random image ids."""
    layout, generator = settings.vocab_layout, torch.Generator().manual_seed(0)
    shape = (settings.training.micro_batch_size, settings.data.sequence_length)
    tokens = torch.randint(settings.vocab.image_codes, shape, generator=generator) + layout.image_start
    labels = torch.cat((tokens[:, 1:], torch.full((shape[0], 1), IGNORE)), dim=1)
    return Batch(tokens, labels, torch.from_numpy(layout.modality(labels.numpy())), samples=[], text_cut=0)


def operations(who: Contestant, backend: Backend) -> Ops:
    """What the contestant's layers receive."""
    ops = choose_ops(backend.device, backend.dtype)
    blocks = ops if who.block == "ours" else choose_ops(backend.device, backend.dtype, "chunked")
    head = ops.linear_cross_entropy
    if who.head == "full logits":
        head = torch.compile(full_logits) if who.compiled else full_logits
    changes = {}
    if who.block == "liger":
        rival = importlib.import_module("liger_kernel.transformers.functional")
        changes = {
            "layer_norm": lambda x, w, b, eps: rival.liger_layer_norm(
                x, w, torch.zeros_like(w) if b is None else b, eps
            ),
            "rms_norm": lambda x, w, eps: rival.liger_rms_norm(x, w, eps),
            "swiglu": rival.liger_swiglu,
        }
        head = liger_head

    if not who.compiled:  # a range would break the graph, where attention is known by its operation's name
        changes["attention"] = named("attention", blocks.attention)
    return dataclasses.replace(blocks, linear_cross_entropy=named("head", head), **changes)


def named(name: str, function: Callable) -> Callable:
    """``function`` as a range of the profiler's."""

    def call(*arguments, **options):
        with record_function(name):
            return function(*arguments, **options)

    return call


def rows_of(targets: Tensor, weight: Tensor, ranges, blocks) -> Tensor:
    """Targets as rows of our table, whose blocks stand in an order of their own; IGNORE for none."""
    rows = local_rows(targets, local_pieces(ranges, blocks or ((0, len(weight)),), 0, 1))
    return rows.masked_fill(rows < 0, IGNORE)


def full_logits(hidden, weight, targets, *, ranges, blocks, token_weight, **_unused) -> TokenLosses:
    """The head as one writes it down; it reports the loss alone."""
    logits = (hidden @ weight.T).float()
    nll = F.cross_entropy(logits, rows_of(targets, weight, ranges, blocks), ignore_index=IGNORE, reduction="none")
    nothing = torch.zeros_like(nll.detach())
    return TokenLosses(nll * token_weight, nll.detach(), nothing, nothing, nothing)


def liger_head(hidden, weight, targets, *, ranges, blocks, token_weight, **_unused) -> TokenLosses:
    """Liger's, as a sum over tokens of one weight: its per-token form costs it a pass more."""
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    total = loss(ignore_index=IGNORE, reduction="sum")(weight, hidden, rows_of(targets, weight, ranges, blocks))
    nothing = torch.zeros(len(targets), device=hidden.device)
    return TokenLosses((total * token_weight.max())[None], nothing, nothing, nothing, nothing)


def header() -> str:
    columns = "".join(f"{part:>12}" for part in PARTS)
    return f"{'':36}{'ms':>9}{'min':>9}{'max':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'MB':>8}{'|g|':>8}{columns}"


def table_line(name: str, row: dict) -> str:
    """A line of the table; the parts as shares of the profiled step."""
    if "error" in row:
        return f"{name:36}{row['error']}"
    whole = sum(row["parts"].values())
    shares = "".join(f"{row['parts'][part] / whole:12.1%}" for part in PARTS)
    mfu = f"{row['mfu']:7.1%}" if row["mfu"] else f"{'-':>7}"
    peak = f"{row['peak_mb']:8,.0f}" if row["peak_mb"] else f"{'-':>8}"
    return (
        f"{name:36}{row['ms']:9.1f}{row['min']:9.1f}{row['max']:9.1f}{row['tokens_per_s']:10,.0f}{row['tflops']:9.3f}"
        f"{mfu}{peak}{row['grad_norm']:8.4f}{shares}"
    )


if __name__ == "__main__":
    main()
