"""A whole training step of a configuration: ours, the same model in plain PyTorch with torch.compile, and with Liger.

    python benchmarks/bench_step.py [section.key=value ...] [--json FILE] [--config FILE] [--micro-batch M ...]
        [--only NAME ...] [--minutes M]

All contestants are the same model, weights and rows, trained by our own ``train_step`` and engine on one device, one
micro-batch a step; they differ in the operations of the blocks, in the loss head, in what torch.compile is given (every
block by itself) and in what is computed again. Each is built, timed and freed in turn, as memory holds one. The norm of
the first gradient shows that they do the same work. Every position but a row's last has a label, so no head gains by
leaving pads out. MFU by the FLOPs of ``megat2i.model.cost``; the break-down of a step by part is the profiler's.
"""

import dataclasses
import gc
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from harness import FEWEST_ROUNDS, OUT_OF_TIME, ROOT, Record, failure, installed, one_time, parser_for, spread
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
from megat2i.model.gpt import GPT, initial_values
from megat2i.model.part import Part
from megat2i.optim.torch_engine import TorchEngine
from megat2i.pipeline import Pipeline
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import train_step
from megat2i.vocab import IGNORE


class Contestant(NamedTuple):
    """``block``: ours | pytorch | liger; ``head``: ours | full logits | liger; ``compiled``: blocks and full logits."""

    block: str = "ours"
    head: str = "ours"
    compiled: bool = False
    recompute: str = "none"


CONTESTANTS = {  # what the record needs first comes first
    "ours": Contestant(),
    "PyTorch compiled, full logits": Contestant("pytorch", "full logits", compiled=True),
    "PyTorch compiled, Liger head": Contestant("pytorch", "liger", compiled=True),
    "Liger": Contestant("liger", "liger"),
    "ours, blocks compiled": Contestant(compiled=True),
    "ours, selective recomputation": Contestant(recompute="selective"),
    "ours, full recomputation": Contestant(recompute="full"),
    "PyTorch blocks compiled, our head": Contestant(block="pytorch", compiled=True),
    "PyTorch, full logits": Contestant("pytorch", "full logits"),
}
MICRO_BATCHES = [16, 8, 32, 48]  # of the first contestant until memory is full; the others have the first one alone


def main() -> None:
    """Every contestant at the first size of micro-batch, and the first contestant at the other sizes."""
    cuda, parser = torch.cuda.is_available(), parser_for(__doc__)
    default = "configs/open_lm_1b_t2i.yaml" if cuda else "configs/openmoji_demo.yaml"
    parser.add_argument("--config", default=str(ROOT / default))
    parser.add_argument("--micro-batch", type=int, nargs="*", default=MICRO_BATCHES if cuda else [4, 2], help="rows")
    parser.add_argument("--only", nargs="*", choices=tuple(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=10 if cuda else 5)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    backend = Backend.resolve(config.load(arguments.config, arguments.overrides))
    backend.start(seed=0)
    record = Record("step", arguments.json, backend.device, arguments.minutes)
    for number, rows in enumerate(arguments.micro_batch):
        size = [f"training.micro_batch_size={rows}", f"training.global_batch_size={rows}"]
        settings = config.load(arguments.config, [*arguments.overrides, *size])
        groups = ParallelGroups.create(settings.parallel)
        name_of_section = f"{rows} rows of {settings.data.sequence_length:,}"
        print(f"\n{name_of_section}, {backend.describe()}\n{header()}")
        for name in arguments.only if number == 0 else arguments.only[:1]:
            row = measure(CONTESTANTS[name], settings, backend, groups, arguments.rounds, record)
            print(table_line(name, row), flush=True)
            record.add(name_of_section, {name: row})
    dist.destroy_process_group()
    record.finish()


def measure(
    who: Contestant, settings: config.Config, backend: Backend, groups: ParallelGroups, rounds: int, record: Record
) -> dict:
    """Figures of one contestant, or why there are none."""
    if record.left() < 0:
        return OUT_OF_TIME
    if "liger" in who[:2] and (backend.device.type != "cuda" or not installed("liger_kernel")):
        return {"skipped": "needs a GPU and liger-kernel"}
    try:
        row = figures(who, settings, backend, groups, rounds, record)
    except torch.cuda.OutOfMemoryError:
        row = {"skipped": "out of memory"}  # a figure too: that is how much it needs
    except Exception as error:  # a rival's own way to fail; the table says how
        row = failure(error)
    torch._dynamo.reset()
    gc.collect()  # hooks of parameters are cycles; the next contestant needs the memory
    if backend.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def figures(
    who: Contestant, settings: config.Config, backend: Backend, groups: ParallelGroups, rounds: int, record: Record
) -> dict:
    """Times in milliseconds, speed, memory, the first gradient's norm and milliseconds by part."""
    step, norm = make_step(who, settings, backend, groups)
    step()
    peak, times = peak_memory(step, backend.device), []
    while len(times) < rounds and (record.left() > 0 or len(times) < FEWEST_ROUNDS):
        times.append(one_time(step, backend.device))
    parts = parts_of_step(step, backend.device)
    length = settings.data.sequence_length
    tokens = settings.training.micro_batch_size * (length - 1)
    columns = sum(stop - start for start, stop in settings.vocab_layout.ranges)
    row = spread(times)
    speed = 1000 * tokens / row["ms"]
    flops = speed * flops_per_token(settings.model, columns, length)
    best = peak_flops(backend.device, backend.dtype)
    return row | {
        "ours": who.block == who.head == "ours" and not who.compiled,
        "recompute": who.recompute,
        "micro_batch": settings.training.micro_batch_size,
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
    set_initial_weights(model)
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


@torch.no_grad()
def set_initial_weights(model: GPT) -> None:
    """Drawn on the model's device: the CPU takes minutes for a billion."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_values(name, tuple(parameter.shape), 0, parameter.device))


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
        changes = liger_blocks()
    if who.head == "liger":
        head = liger_head
    if not who.compiled:  # a range would break the graph, where attention is known by its operation's name
        changes["attention"] = named("attention", blocks.attention)
    return dataclasses.replace(blocks, linear_cross_entropy=named("head", head), **changes)


def liger_blocks() -> dict[str, Callable]:
    """Liger's norms, with the sum before them as PyTorch makes it, and its SwiGLU."""
    rival = importlib.import_module("liger_kernel.transformers.functional")

    def layer_norm(x, weight, bias, eps):
        return rival.liger_layer_norm(x, weight, torch.zeros_like(weight) if bias is None else bias, eps)

    def rms_norm(x, weight, eps):
        return rival.liger_rms_norm(x, weight, eps)

    def of_sum(norm: Callable) -> Callable:
        def call(x, residual, *gain):
            total = x + residual
            return norm(total, *gain), total

        return call

    return {
        "layer_norm": layer_norm,
        "rms_norm": rms_norm,
        "add_layer_norm": of_sum(layer_norm),
        "add_rms_norm": of_sum(rms_norm),
        "swiglu": rival.liger_swiglu,
    }


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
    if "ms" not in row:
        return f"{name:36}{row.get('error') or row['skipped']}"
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
