"""Finding the newest sound checkpoint and filling an engine or a model from it, under whatever layout they have.

What is hashed when: ``latest`` hashes every part of the checkpoint once, shared out over the ranks, so that damage is
known before a weight changes. Loading hashes again, but only what a rank reads: the parts that overlap what it holds,
each once. They are at most 64 MiB, so a rank of many reads little beyond its own share.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megat2i.checkpoint.agreement import CheckpointError, all_ranks, any_rank, from_first_rank, together
from megat2i.checkpoint.boxes import Place, common, places, without
from megat2i.checkpoint.folder import (
    Checkpoint,
    committed,
    open_checkpoint,
    part_boxes,
    read_parts,
    step_number,
    verify,
)
from megat2i.optim.engine import WEIGHT, Engine, Fragment
from megat2i.parallel.shard import Box, Shard
from megat2i.progress_marks import mark


def latest(
    folder: Path, report: Callable[[str], None], before: int | None = None, passing: int = 0
) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that verifies on all ranks; ``report`` gets a line for each that does not.

    ``before``: only those of earlier steps; ``passing``: without so many of the newest of them, where there are others.
    Collective; each rank hashes its share of the parts.
    """
    mark("checking the checkpoints")
    steps = [step_number(path) for path in committed(folder)] if dist.get_rank() == 0 else []
    steps = [step for step in steps if before is None or step < before]
    for step in from_first_rank(steps[min(passing, max(len(steps) - 1, 0)) :]):
        path = folder / f"step-{step}"
        problem = None
        try:
            checkpoint = open_checkpoint(path)
            verify(checkpoint, share=(dist.get_rank(), dist.get_world_size()))
        except CheckpointError as error:
            problem = str(error)
        if all_ranks(problem is None):
            return checkpoint
        report(f"skipping {path}: {problem or 'another rank found it damaged'}")
    return None


def latest_here(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that verifies, found by this process alone."""
    for path in committed(folder):
        try:
            checkpoint = open_checkpoint(path)
            verify(checkpoint)
            return checkpoint
        except CheckpointError as error:
            print(f"skipping {path}: {error}", file=sys.stderr)
    return None


def load_engine(checkpoint: Checkpoint, engine: Engine) -> None:
    """Fill the engine's state, under any layout and engine; collective.

    Raises CheckpointError, before anything is changed, where the checkpoint lacks state of this model or holds state
    that no rank has a place for; and where a part turns out to be damaged.
    """
    mark("loading the checkpoint")
    saved = sorted({(part["kind"], part["name"]) for part in checkpoint.manifest["parts"]})
    held = {(fragment.kind, fragment.name) for fragment in engine.fragments()}
    known = any_rank([state in held for state in saved])  # a pipeline stage knows its own layers only
    if not all(known):
        kind, name = saved[known.index(False)]
        raise CheckpointError(f"{checkpoint.path} holds {kind} of {name}, which this run does not have")
    copies: list[_Copy] = []
    together(lambda: copies.extend(_plan(checkpoint, engine.fragments())), f"cannot load {checkpoint.path}")
    together(lambda: _carry_out(checkpoint, copies), f"cannot load {checkpoint.path}")
    engine.loaded(checkpoint.manifest["optimizer_updates"])


@torch.no_grad()
def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fill the model's parameters from the master weights, rounded to the model's dtype (for sampling)."""
    shards = model.shards()
    fragments = [
        Fragment(name, WEIGHT, shards[name], 0, parameter.data.view(-1), written=False)
        for name, parameter in model.named_parameters()
    ]
    _carry_out(checkpoint, _plan(checkpoint, fragments))


def weight_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Global shapes of the parameters in the checkpoint."""
    return {part["name"]: tuple(part["shape"]) for part in checkpoint.manifest["parts"] if part["kind"] == WEIGHT}


@torch.no_grad()
def read_tensor(checkpoint: Checkpoint, name: str, kind: str = WEIGHT) -> Tensor:
    """The whole float32 master weight, or Adam moment, of one parameter."""
    shape = weight_shapes(checkpoint)[name]
    values = torch.empty(shape)
    fragment = Fragment(name, kind, Shard.whole(shape), 0, values.view(-1), written=False)
    _carry_out(checkpoint, _plan(checkpoint, [fragment]))
    return values


class _Copy(NamedTuple):
    """The elements of ``box`` go from their place in a part of the checkpoint to their place in ``values``."""

    part: dict
    source: Place
    target: Place
    box: Box
    values: Tensor


def _plan(checkpoint: Checkpoint, fragments: list[Fragment]) -> list[_Copy]:
    """What has to be copied so that every element of the fragments is filled exactly once."""
    index: dict[tuple[str, str], list[dict]] = {}
    for part in checkpoint.manifest["parts"]:
        index.setdefault((part["name"], part["kind"]), []).append(part)
    copies = []
    for fragment in fragments:
        missing = [(target, target.box) for target in places(fragment.boxes)]
        for part in index.get((fragment.name, fragment.kind), []):
            if tuple(part["shape"]) != fragment.shard.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: {fragment.name} has shape {part['shape']}, "
                    f"the model wants {list(fragment.shard.shape)}"
                )
            for source in places(part_boxes(part)):
                still_missing = []
                for target, box in missing:
                    both = common(source.box, box)
                    if both is None:
                        still_missing.append((target, box))
                        continue
                    copies.append(_Copy(part, source, target, both, fragment.values))
                    still_missing += [(target, rest) for rest in without(box, both)]
                missing = still_missing
        if missing:
            box = missing[0][1]
            raise CheckpointError(
                f"{checkpoint.path}: elements {list(box.start)} to {list(box.stop)} of {fragment.name} "
                f"({fragment.kind}) are missing; was it written by another model?"
            )
    return copies


@torch.no_grad()
def _carry_out(checkpoint: Checkpoint, copies: list[_Copy]) -> None:
    """Read every part that the copies need once, one at a time, and copy what is needed of it."""
    by_part: dict[tuple[str, str], list[_Copy]] = {}
    for copy in copies:
        by_part.setdefault((copy.part["file"], copy.part["key"]), []).append(copy)
    for part, values in read_parts(checkpoint, [group[0].part for group in by_part.values()]):
        for copy in by_part[part["file"], part["key"]]:
            copy.target.view(copy.values, copy.box).copy_(copy.source.view(values, copy.box))
