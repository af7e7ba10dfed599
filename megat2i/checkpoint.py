"""Checkpoints that know no layout: every tensor by global name and shape, whatever ranks and engine wrote it.

``<run>/checkpoints/step-N/`` holds one safetensors file a rank and ``manifest.json``. A part of a file names its global
tensor and the run of elements that it fills; its SHA-256 is taken in memory before it is written and compared when it
is read. A checkpoint is committed by renaming a complete, fsynced temporary folder, with the manifest written last; the
newest one that verifies wins, and all ranks agree on it. No pickle anywhere.

Master weights, Adam's moments and the step are all the state there is: the order of the samples and the dropped
captions are pure functions of the step, and training draws no random numbers.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megat2i.files import PendingFile, fsync_folder
from megat2i.files import commit as commit_files
from megat2i.optim.engine import WEIGHT, Engine, Fragment

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder and its manifest."""

    path: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]


def save(folder: Path, step: int, engine: Engine, layout: str, keep: int) -> Path:
    """Write ``folder/step-N`` from all ranks and drop all but the newest ``keep``; returns its path.

    Collective. If any rank fails, every rank raises CheckpointError and what was committed before stays.
    """
    final = folder / f"step-{step}"
    temporary = folder / f"step-{step}.writing"
    _together(lambda: _prepare(temporary) if dist.get_rank() == 0 else None, f"cannot create {temporary}")
    _together(lambda: _write_rank(temporary, engine.fragments()), f"cannot write {temporary}")

    def commit() -> None:
        if dist.get_rank() != 0:
            return
        parts = []
        for rank in range(dist.get_world_size()):
            listing = temporary / f"rank-{rank:05d}.json"
            parts += json.loads(listing.read_text())
            listing.unlink()
        manifest = {
            "format": FORMAT_VERSION,
            "step": step,
            "optimizer_updates": engine.updates,
            "written_by": {"layout": layout, "ranks": dist.get_world_size(), "engine": type(engine).__name__},
            "parts": parts,
        }
        text = json.dumps(manifest, indent=1)
        body = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}
        _write_json(temporary / MANIFEST, body)
        _remove(final)  # a damaged attempt at the same step: a sound one would have been resumed
        os.rename(temporary, final)
        fsync_folder(folder)
        # Only steps up to this one: what is newer was found damaged and must not push out what is sound.
        for old in [path for path in committed(folder) if _number(path) <= step][keep:]:
            _remove(old)

    _together(commit, f"cannot commit {final}")
    return final


def latest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that verifies on all ranks; ``report`` gets a line for each that does not.

    Collective; each rank hashes its share of the files.
    """
    steps = [_number(path) for path in committed(folder)] if dist.get_rank() == 0 else []
    for step in _from_first_rank(steps):
        path = folder / f"step-{step}"
        problem = None
        try:
            checkpoint = open_checkpoint(path)
            verify(checkpoint, share=(dist.get_rank(), dist.get_world_size()))
        except CheckpointError as error:
            problem = str(error)
        if _all_ranks(problem is None):
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


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest of one checkpoint folder; raises CheckpointError."""
    try:
        body = json.loads((path / MANIFEST).read_text())
        text = body["manifest"]
        if hashlib.sha256(text.encode()).hexdigest() != body["sha256"]:
            raise CheckpointError(f"{path / MANIFEST}: its digest does not match; the file is damaged")
        manifest = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not readable as a checkpoint manifest: {error}") from error
    if manifest["format"] != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {manifest['format']}, this version reads {FORMAT_VERSION}")
    return Checkpoint(path, manifest)


def verify(checkpoint: Checkpoint, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the digest of every ``share[1]``-th part, from ``share[0]``; raises CheckpointError naming the part."""
    parts = checkpoint.manifest["parts"][share[0] :: share[1]]
    for part in parts:
        _read_part(checkpoint.path, part)


def load_engine(checkpoint: Checkpoint, engine: Engine) -> None:
    """Fill the engine's state, under any layout and engine; collective. Raises CheckpointError on missing state."""

    def fill() -> None:
        index = _index(checkpoint)
        fragments = engine.fragments()
        for fragment in fragments:
            _fill(checkpoint, index, fragment)
        foreign = {name for name, _ in index} - set(engine.parameters)
        if foreign:
            raise CheckpointError(f"it holds {sorted(foreign)[0]}, which this model does not have")

    _together(fill, f"cannot load {checkpoint.path}")
    engine.loaded(checkpoint.manifest["optimizer_updates"])


@torch.no_grad()
def load_weights(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Fill the model's parameters from the master weights, rounded to the model's dtype (for sampling)."""
    index = _index(checkpoint)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.numel(), dtype=torch.float32)
        _fill(checkpoint, index, Fragment(name, WEIGHT, tuple(parameter.shape), 0, values))
        parameter.copy_(values.view(parameter.shape))


def _index(checkpoint: Checkpoint) -> dict[tuple[str, str], list[dict]]:
    index: dict[tuple[str, str], list[dict]] = {}
    for part in checkpoint.manifest["parts"]:
        index.setdefault((part["name"], part["kind"]), []).append(part)
    return index


def _fill(checkpoint: Checkpoint, index: dict, fragment: Fragment) -> None:
    """Copy the elements of ``fragment`` from every part that overlaps it."""
    stop = fragment.start + fragment.values.numel()
    filled = fragment.start  # all elements before this one are there
    for part in sorted(index.get((fragment.name, fragment.kind), []), key=lambda part: part["start"]):
        if tuple(part["shape"]) != fragment.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {fragment.name} has shape {part['shape']}, the model wants {list(fragment.shape)}"
            )
        low, high = max(part["start"], filled), min(part["stop"], stop)
        if low >= high:
            continue
        if low > filled:
            break
        values = _read_part(checkpoint.path, part)
        source = values[low - part["start"] : high - part["start"]]
        fragment.values[low - fragment.start : high - fragment.start].copy_(source)
        filled = high
    if filled != stop:
        raise CheckpointError(
            f"{checkpoint.path}: elements {filled} to {stop} of {fragment.name} ({fragment.kind}) are missing; "
            "was it written by another model?"
        )


def _read_part(folder: Path, part: dict) -> Tensor:
    path = folder / part["file"]
    try:
        with safe_open(path, framework="pt") as file:
            values = file.get_tensor(part["key"])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read part '{part['key']}': {error}") from error
    if _digest(values) != part["sha256"]:
        raise CheckpointError(f"{path}: the digest of part '{part['key']}' does not match; the file is damaged")
    return values


def _prepare(temporary: Path) -> None:
    for pattern in ("step-*.writing", "step-*.removing"):  # left by killed attempts
        for leftover in temporary.parent.glob(pattern):
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint; whatever interrupts it, no torn one is left under a committed name."""
    if path.exists():
        doomed = path.with_name(path.name + ".removing")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _write_rank(temporary: Path, fragments: list[Fragment]) -> None:
    file = f"rank-{dist.get_rank():05d}.safetensors"
    tensors, parts = {}, []
    for fragment in fragments:
        stop = fragment.start + fragment.values.numel()
        key = f"{fragment.kind}/{fragment.name}/{fragment.start}"
        tensors[key] = fragment.values.detach().cpu().contiguous()
        parts.append(
            {
                "name": fragment.name,
                "kind": fragment.kind,
                "shape": list(fragment.shape),
                "start": fragment.start,
                "stop": stop,
                "file": file,
                "key": key,
                "sha256": _digest(tensors[key]),
            }
        )
    if tensors:
        save_file(tensors, temporary / file)
        with open(temporary / file, "rb") as written:
            os.fsync(written.fileno())
    _write_json(temporary / file.replace(".safetensors", ".json"), parts)


def _write_json(path: Path, content) -> None:
    file = PendingFile(path)
    file.write(json.dumps(content).encode())
    commit_files([file])


def _digest(values: Tensor) -> str:
    return hashlib.sha256(memoryview(values.numpy()).cast("B")).hexdigest()


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders under their committed names, newest first, verified or not."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _together(action: Callable[[], None], what: str) -> None:
    """Run ``action`` on every rank; if it fails on any, raise on all: nobody is left waiting in a collective."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:  # whatever it is, the other ranks must hear of it before it is raised
        problem = error
    if not _all_ranks(problem is None):
        raise CheckpointError(f"{what}: {problem or 'another rank failed, see its message'}") from problem


def _all_ranks(ok: bool) -> bool:
    verdict = torch.tensor([int(ok)], device=_collective_device())
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    return bool(verdict.item())


def _from_first_rank(numbers: list[int]) -> list[int]:
    count = torch.tensor([len(numbers)], device=_collective_device())
    dist.broadcast(count, src=0)
    values = torch.zeros(int(count.item()), dtype=torch.int64, device=count.device)
    if dist.get_rank() == 0:
        values.copy_(torch.tensor(numbers, dtype=torch.int64))
    dist.broadcast(values, src=0)
    return values.tolist()


def _collective_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
