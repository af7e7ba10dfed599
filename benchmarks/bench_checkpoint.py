"""Save and load bandwidth of our checkpoints against torch.distributed.checkpoint and plain safetensors, in one run.

``python benchmarks/bench_checkpoint.py [--json FILE]``: gloo ranks on this machine hold rows of the same matrices,
their weight and two moments in float32. The three take turns, so that a change of the disk's speed hits all of them.

Ours: SHA-256 of every part, fsync of files and folders, one rename; loading verifies all digests and then hashes again
what it reads. torch.distributed.checkpoint (DTensors cut by rows): fsync of its files, no digests. Safetensors: a file
of every rank and its fsync, no digests, no commit; the floor. The stall is the time until an asynchronous save returns.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from harness import Record, parser_for
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ByRows

from megat2i import checkpoint
from megat2i.optim.engine import KINDS, Fragment
from megat2i.parallel.shard import Shard

MATRICES, COLUMNS = 8, 1024
OURS, DCP, SAFETENSORS = "megat2i", "torch.distributed.checkpoint", "safetensors"


def main() -> None:
    """Start the ranks and print what the first one measured."""
    parser = parser_for(__doc__, minutes=False)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mebibytes", type=int, default=384, help="state of one rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder there is removed again)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        torch.multiprocessing.spawn(measure, (arguments, Path(folder)), nprocs=arguments.ranks)
        results = json.loads((Path(folder) / "results.json").read_text())
    megabytes = 1.048576 * arguments.mebibytes
    print(f"{arguments.ranks} ranks, {megabytes:.0f} MB each, {arguments.rounds} rounds: median (minimum to maximum)")
    for name, sides in results.items():
        for side, value in sides.items():
            unit = "" if side.startswith("ratio") else " s" if name.startswith("stall") else " MB/s per rank"
            median, low, high = (f"{value[key]:.2f}" for key in ("median", "minimum", "maximum"))
            print(f"{name:12} {side:37} {median:>9}{unit} ({low} to {high})")
    record = Record("checkpoint", arguments.json, torch.device("cpu"))
    for name, sides in results.items():
        record.add(name, sides)
    record.finish()


class Rows:
    """Stands for an engine: this rank's rows of every matrix, weight and moments."""

    def __init__(self, mebibytes: int):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        rows = mebibytes * 2**20 // (4 * COLUMNS * len(KINDS) * MATRICES)
        self.shard = Shard((rows * ranks, COLUMNS), 0, ((rows * rank, rows * (rank + 1)),))
        self.parameters, self.updates = tuple(f"matrix.{number}" for number in range(MATRICES)), 1
        generator = torch.Generator().manual_seed(rank)
        self.tensors = {
            (name, kind): torch.rand(rows, COLUMNS, generator=generator) for name in self.parameters for kind in KINDS
        }

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, kind, self.shard, 0, tensor.view(-1), True) for (name, kind), tensor in self.tensors.items()
        ]

    def loaded(self, updates: int) -> None:
        """There is nothing to refresh."""

    def by_key(self) -> dict[str, torch.Tensor]:
        return {f"{kind}/{name}": tensor for (name, kind), tensor in self.tensors.items()}


def measure(rank: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Everything one rank does; the first one leaves ``results.json`` in ``folder``."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), arguments.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.ranks)
    engine = Rows(arguments.mebibytes)
    expected = {key: tensor.clone() for key, tensor in engine.by_key().items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in ("save", "load", "stall")}
    sides = contestants(engine)
    for number in range(arguments.rounds + 1):  # the first round warms up
        for side, actions in sides.items():
            taken = take_turn(actions, engine, folder / f"{side}-{number}")
            for key, tensor in engine.by_key().items():
                if not torch.equal(tensor, expected[key]):
                    raise RuntimeError(f"{side} did not give {key} back; nothing to compare")
            for name, value in taken.items() if number else ():
                seconds[name].setdefault(side, []).append(value)
    if rank == 0:
        megabytes = 1.048576 * arguments.mebibytes
        (folder / "results.json").write_text(json.dumps(summary(seconds, megabytes)))
    dist.destroy_process_group()


def take_turn(actions: tuple, engine: Rows, folder: Path) -> dict[str, float]:
    """Seconds that one side takes for a save, a load and, if it can, the begin of a save in the background."""
    save, load, begin = actions
    taken = {"save": together(lambda: save(folder))}
    for tensor in engine.tensors.values():
        tensor.zero_()
    taken["load"] = together(lambda: load(folder))
    if begin:
        ends: list[Callable[[], object]] = []
        taken["stall"] = together(lambda: ends.append(begin(folder / "background")))
        ends[0]()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return taken


def contestants(engine: Rows) -> dict[str, tuple]:
    """Functions of a folder for every side: save, load, and begin a save and return the function that ends it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    own_group = dist.new_group()  # the collectives in async_save's thread deadlock with those of the main thread
    ours, rank_file = engine.by_key(), f"rank-{dist.get_rank()}.safetensors"

    def distributed() -> dict[str, DTensor]:
        return {key: DTensor.from_local(tensor, mesh, [ByRows(0)], run_check=False) for key, tensor in ours.items()}

    def load_ours(folder: Path) -> None:
        checkpoint.load_engine(checkpoint.latest(folder, print), engine)

    def begin_ours(folder: Path) -> Callable[[], None]:
        checkpoint.save(folder, 1, engine, "", keep=1, background=True)
        return checkpoint.finish

    def save_plain(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(ours, folder / rank_file)
        with open(folder / rank_file, "rb") as file:
            os.fsync(file.fileno())

    def load_plain(folder: Path) -> None:
        for key, tensor in load_file(folder / rank_file).items():
            ours[key].copy_(tensor)

    return {
        OURS: (lambda folder: checkpoint.save(folder, 1, engine, "", keep=1), load_ours, begin_ours),
        DCP: (
            lambda folder: dcp.save(distributed(), checkpoint_id=folder),
            lambda folder: dcp.load(distributed(), checkpoint_id=folder),
            lambda folder: dcp.async_save(distributed(), checkpoint_id=folder, process_group=own_group).result,
        ),
        SAFETENSORS: (save_plain, load_plain, None),
    }


def together(action: Callable[[], object]) -> float:
    """Seconds from the start of ``action`` on all ranks to its end on the last one; every save ends with an fsync."""
    dist.barrier()
    started = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - started


def summary(seconds: dict[str, dict[str, list[float]]], megabytes: float) -> dict:
    """Bandwidths, stalls and our ratio to the others, above 1 where ours is better: medians and ranges."""
    results: dict[str, dict] = {}
    for name, sides in seconds.items():
        rates = {side: values if name == "stall" else [megabytes / t for t in values] for side, values in sides.items()}
        results[name] = {side: spread(values) for side, values in rates.items()}
        for side in sides:
            if side != OURS:
                ratios = [theirs / ours for ours, theirs in zip(sides[OURS], sides[side], strict=True)]
                results[name][f"ratio to {side}"] = spread(ratios)
    return results


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "minimum": min(values), "maximum": max(values)}


if __name__ == "__main__":
    main()
