"""The folder of one checkpoint: safetensors files of parts, and the manifest that names them and vouches for them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megat2i.checkpoint import manifest as manifests
from megat2i.checkpoint.agreement import CheckpointError
from megat2i.checkpoint.manifest import part_size, read_manifest
from megat2i.files import PendingFile, fsync_folder, step_of
from megat2i.optim.engine import Fragment
from megat2i.optim.finite import KIND_NAMES, row_not_finite
from megat2i.parallel.shard import Box
from megat2i.progress_marks import beat

PART_ELEMENTS = 1 << 24  # 64 MiB: the most that a reader holds at a time, and reads for the sake of a few elements
LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, little-endian


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its manifest, whose own digest matched."""

    path: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders under their committed names, newest first, verified or not. Other names are no checkpoints."""
    named = [path for path in folder.glob("step-*") if step_of(path.name) is not None]
    return sorted(named, key=step_number, reverse=True)


def step_number(path: Path) -> int:
    """The step in the name of a committed checkpoint folder."""
    return step_of(path.name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest of one checkpoint folder; raises CheckpointError."""
    return Checkpoint(path, read_manifest(path))


def verify(checkpoint: Checkpoint, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the digest of every ``share[1]``-th part, from ``share[0]``; raises CheckpointError naming the part.

    All shares together compare every byte of the files. So does a value that is not finite: a checkpoint of an older
    version may hold one.
    """
    for part, values in read_parts(checkpoint, checkpoint.manifest["parts"][share[0] :: share[1]]):
        row = row_not_finite(values, part_boxes(part))
        if row is not None:
            raise CheckpointError(f"{KIND_NAMES[part['kind']]} {part['name']} is not finite in row {row}")


def read_parts(checkpoint: Checkpoint, parts: list[dict]) -> Iterator[tuple[dict, Tensor]]:
    """Each of ``parts`` and its values [n] float32, one at a time, after comparing their digest; file by file.

    Raises CheckpointError where anything about a file is not as it was written.
    """
    for name, group in groupby(sorted(parts, key=itemgetter("file")), itemgetter("file")):
        path, part = checkpoint.path / name, None
        try:
            _verify_header(path, checkpoint.manifest)
            with safe_open(path, framework="pt") as file:
                for part in group:
                    beat()
                    yield part, _read_part(path, file, part)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read {part['key'] if part else 'its header'}: {error}") from error


def _verify_header(path: Path, manifest: dict) -> None:
    """Compare size and header with the manifest, which has no digest of them in the format before this one."""
    if manifest["format"] == manifests.WITHOUT_FILES:
        return
    expected = manifest["files"][path.name]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(expected["header_bytes"])
    if size != expected["bytes"]:
        raise CheckpointError(f"{path}: {size:,} bytes, {expected['bytes']:,} were written; the file is damaged")
    if hashlib.sha256(header).hexdigest() != expected["header"]:
        raise CheckpointError(f"{path}: the digest of its header does not match; the file is damaged")


def _read_part(path: Path, file, part: dict) -> Tensor:
    """The values of ``part`` from the open safetensors ``file``."""
    stored = file.get_slice(part["key"])
    if stored.get_dtype() != "F32" or stored.get_shape() != [part_size(part)]:
        raise CheckpointError(
            f"{path}: part '{part['key']}' is {stored.get_dtype()} {stored.get_shape()}, "
            f"F32 [{part_size(part)}] was written; the file is damaged"
        )
    values = file.get_tensor(part["key"])
    if digest(values) != part["sha256"]:
        raise CheckpointError(f"{path}: the digest of part '{part['key']}' does not match; the file is damaged")
    return values


def part_boxes(part: dict) -> list[Box]:
    """The boxes of the global tensor that the part's values fill, in their order."""
    return [Box(tuple(start), tuple(stop)) for start, stop in part["boxes"]]


def write_rank(folder: Path, rank: int, fragments: list[Fragment]) -> None:
    """Write and fsync a rank's safetensors file and then the listing of the file and its parts."""
    file = f"rank-{rank:05d}.safetensors"
    tensors, parts, files = {}, [], {}
    for fragment in fragments:
        for offset in range(0, fragment.values.numel(), PART_ELEMENTS):
            values = fragment.values[offset : offset + PART_ELEMENTS].detach().cpu().float()
            start = fragment.start + offset
            key = f"{fragment.kind}/{fragment.name}/{start}"
            tensors[key] = values
            parts.append(
                {
                    "name": fragment.name,
                    "kind": fragment.kind,
                    "shape": fragment.shard.shape,
                    "boxes": fragment.shard.boxes(start, start + values.numel()),
                    "file": file,
                    "key": key,
                    "sha256": digest(values),
                }
            )
    if tensors:
        save_file(tensors, folder / file)
        os.chmod(folder / file, os.stat(folder).st_mode & 0o666)  # the library leaves it to its owner alone
        files[file] = _describe_and_sync(folder / file)
    _write_listing(listing(folder, rank), {"files": files, "parts": parts})


def _write_listing(path: Path, content: dict) -> None:
    """Write a rank's listing, its last act in the folder: the first rank renames that as soon as all listings exist."""
    file = PendingFile(path)
    file.write(json.dumps(content).encode())
    file.flush_to_disk()
    fsync_folder(path.parent)  # for the rank's other file; the manifest's writer does it once more, for the listing
    os.rename(file.temporary, path)


def _describe_and_sync(path: Path) -> dict:
    """Size of a new safetensors file, and size and digest of its header; the file is durable then."""
    with open(path, "rb") as file:
        length = file.read(LENGTH_BYTES)
        header = length + file.read(int.from_bytes(length, "little"))
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return {"bytes": size, "header_bytes": len(header), "header": hashlib.sha256(header).hexdigest()}


def listing(folder: Path, rank: int) -> Path:
    """The file in which a rank lists its parts for the one that writes the manifest."""
    return folder / f"rank-{rank:05d}.json"


def write_manifest(folder: Path, ranks: int, content: dict) -> None:
    """Gather the listings of all ranks into the manifest, beside the other ``content`` of it."""
    parts, files = [], {}
    for rank in range(ranks):
        listed = json.loads(listing(folder, rank).read_text())
        parts += listed["parts"]
        files |= listed["files"]
        listing(folder, rank).unlink()
    manifests.write_manifest(folder, content, parts, files)


def remove(path: Path) -> None:
    """Remove a checkpoint; whatever interrupts it, no torn one is left under a committed name."""
    if path.exists():
        doomed = path.with_name(path.name + ".removing")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def digest(values: Tensor) -> str:
    """SHA-256 of the bytes of a CPU tensor."""
    return hashlib.sha256(memoryview(values.numpy()).cast("B")).hexdigest()
