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

from megat2i.checkpoint.agreement import CheckpointError
from megat2i.files import PendingFile
from megat2i.files import commit as commit_files
from megat2i.optim.engine import Fragment
from megat2i.parallel.shard import Box
from megat2i.progress_marks import beat

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PART_ELEMENTS = 1 << 24  # 64 MiB: the most that a reader holds at a time, and reads for the sake of a few elements


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its manifest, whose own digest matched."""

    path: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders under their committed names, newest first, verified or not."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_number, reverse=True)


def step_number(path: Path) -> int:
    """The step in the name of a committed checkpoint folder."""
    return int(path.name.removeprefix("step-"))


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
        raise CheckpointError(
            f"{path}: format {manifest['format']}, this version reads {FORMAT_VERSION}; "
            "continue with the version of megat2i that wrote it"
        )
    return Checkpoint(path, manifest)


def verify(checkpoint: Checkpoint, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the digest of every ``share[1]``-th part, from ``share[0]``; raises CheckpointError naming the part."""
    for _ in read_parts(checkpoint.path, checkpoint.manifest["parts"][share[0] :: share[1]]):
        pass


def read_parts(folder: Path, parts: list[dict]) -> Iterator[tuple[dict, Tensor]]:
    """Each of ``parts`` and its values [n] float32, one at a time, after comparing their digest; file by file."""
    for name, group in groupby(sorted(parts, key=itemgetter("file")), itemgetter("file")):
        path, part = folder / name, None
        try:
            with safe_open(path, framework="pt") as file:
                for part in group:
                    beat()
                    values = file.get_tensor(part["key"])
                    if digest(values) != part["sha256"]:
                        raise CheckpointError(
                            f"{path}: the digest of part '{part['key']}' does not match; the file is damaged"
                        )
                    yield part, values
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read {part['key'] if part else 'its header'}: {error}") from error


def part_boxes(part: dict) -> list[Box]:
    """The boxes of the global tensor that the part's values fill, in their order."""
    return [Box(tuple(start), tuple(stop)) for start, stop in part["boxes"]]


def write_rank(folder: Path, rank: int, fragments: list[Fragment]) -> None:
    """Write and fsync a rank's safetensors file and then the listing of its parts."""
    file = f"rank-{rank:05d}.safetensors"
    tensors, parts = {}, []
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
        with open(folder / file, "rb") as written:
            os.fsync(written.fileno())
    write_json(listing(folder, rank), parts)


def listing(folder: Path, rank: int) -> Path:
    """The file in which a rank lists its parts for the one that writes the manifest."""
    return folder / f"rank-{rank:05d}.json"


def write_manifest(folder: Path, ranks: int, content: dict) -> None:
    """Gather the listings of all ranks into the manifest, beside the other ``content`` of it."""
    parts = []
    for rank in range(ranks):
        parts += json.loads(listing(folder, rank).read_text())
        listing(folder, rank).unlink()
    text = json.dumps({"format": FORMAT_VERSION, **content, "parts": parts})
    write_json(folder / MANIFEST, {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text})


def write_json(path: Path, content) -> None:
    """Write a JSON file that is durable, and complete under its name or not there."""
    file = PendingFile(path)
    file.write(json.dumps(content).encode())
    commit_files([file])


def remove(path: Path) -> None:
    """Remove a checkpoint; whatever interrupts it, no torn one is left under a committed name."""
    if path.exists():
        doomed = path.with_name(path.name + ".removing")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def digest(values: Tensor) -> str:
    """SHA-256 of the bytes of a CPU tensor."""
    return hashlib.sha256(memoryview(values.numpy()).cast("B")).hexdigest()
