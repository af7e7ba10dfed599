"""Stands for an engine of any layout, without a model: every element tells its tensor, kind, index and step."""

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist

from megat2i import checkpoint
from megat2i.optim.engine import KINDS, Fragment
from megat2i.parallel.shard import Shard


@dataclass(frozen=True)
class Split:
    """How tensor ranks share a tensor of ``shape``: its ``parts`` (start, stop) one by one, along ``dimension``.

    Without parts every rank holds all of it. ``stage``: the share of the layers before it, 0 .. 1.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[int, int], ...] = ()
    dimension: int = 0
    stage: float = 0.0

    def shard(self, rank: int, ranks: int) -> Shard:
        if not self.parts:
            return Shard.whole(self.shape)
        pieces = []
        for start, stop in self.parts:
            share = (stop - start) // ranks
            pieces.append((start + rank * share, start + (rank + 1) * share))
        return Shard(self.shape, self.dimension, tuple(pieces))


@dataclass(frozen=True)
class Layout:
    """Numbers of ranks along each axis, tensor innermost; ``zero``: state cut flat over data ranks, else copied."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    zero: bool = True

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data * self.tensor


class NumberedEngine:
    """This rank's state of ``splits`` under ``layout``. ``loaded`` compares all of it with what ``step`` would make."""

    def __init__(self, splits: dict[str, Split], layout: Layout):
        rank = dist.get_rank()
        stage, data, tensor = rank // (layout.data * layout.tensor), rank // layout.tensor % layout.data, rank
        tensor %= layout.tensor
        self.numbers = {name: number for number, name in enumerate(splits)}
        mine = {name: split for name, split in splits.items() if int(split.stage * layout.pipeline) == stage}
        shards = {name: split.shard(tensor, layout.tensor) for name, split in mine.items()}
        self.updates, self.parts = 0, []
        total = sum(prod(shard.local_shape) for shard in shards.values())
        share = -(-total // layout.data) if layout.zero else total
        first = share * data if layout.zero else 0
        flat = {kind: torch.full((share,), torch.nan) for kind in KINDS}
        begin = 0  # of a parameter in the flattened parameters
        for name, shard in shards.items():
            end = begin + prod(shard.local_shape)
            low, high = max(begin, first), min(end, first + share)
            written = (layout.zero or data == 0) and (tensor == 0 or not shard.is_whole)
            for kind in KINDS if low < high else ():
                values = flat[kind][low - first : high - first]
                self.parts.append(Fragment(name, kind, shard, low - begin, values, written))
            begin = end

    def expected(self, part: Fragment, step: int) -> torch.Tensor:
        index = torch.arange(prod(part.shard.shape)).view(part.shard.shape)
        everything = index + 7 * step + 100_000 * (3 * self.numbers[part.name] + KINDS.index(part.kind))
        stop = part.start + len(part.values)
        return part.shard.cut(everything).flatten()[part.start : stop].float()

    def step(self, number: int) -> None:
        self.updates = number
        for part in self.parts:
            part.values.copy_(self.expected(part, number))

    def fragments(self) -> list[Fragment]:
        return self.parts

    def loaded(self, updates: int) -> None:
        for part in self.parts:
            assert torch.equal(part.values, self.expected(part, updates)), f"{part.name} ({part.kind}) is wrong"
        self.updates = updates


def flat_engine(size: int = 300) -> NumberedEngine:
    """A little state in one flat tensor, cut over all ranks."""
    return NumberedEngine({"w": Split((size,))}, Layout(data=dist.get_world_size()))


def save_steps(folder: Path, *steps: int, keep: int = 9, background: bool = False) -> None:
    engine = flat_engine()
    for step in steps:
        engine.step(step)
        checkpoint.save(folder, step, engine, "1.1.1", keep, background)


def newest(folder: Path) -> tuple[int | None, list[str]]:
    """Step that ``latest`` gives (its state is loaded and checked), and what it reported."""
    lines: list[str] = []
    found = checkpoint.latest(folder, lines.append)
    if found:
        checkpoint.load_engine(found, flat_engine())
    return found.step if found else None, lines


def rewrite_manifest(path: Path, **changed) -> None:
    """Change entries of a manifest and make its digest match again."""
    text = json.dumps(json.loads(json.loads(path.read_text())["manifest"]) | changed)
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}))
