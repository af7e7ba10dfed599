"""The manifest of a checkpoint: what it lists of parts and files, and every reason not to believe it.

It is JSON text beside its own SHA-256. Its digests cover each byte of each rank's file once: those of the parts cover
the values, and that of the header (its length and its JSON text) covers how the values are to be read.
"""

import hashlib
import json
import re
from math import prod
from pathlib import Path

from megat2i.checkpoint.agreement import CheckpointError
from megat2i.files import PendingFile, commit
from megat2i.optim.engine import KINDS

FORMAT_VERSION = 3
WITHOUT_FILES = 2  # the format before: no digest of the headers
MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"rank-[0-9]{5,9}\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifest(folder: Path) -> dict:
    """The manifest of the checkpoint in ``folder``; raises CheckpointError unless all of it can be what was written."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text())
        text = body["manifest"]
        damaged = hashlib.sha256(text.encode()).hexdigest() != body["sha256"]
        manifest = None if damaged else json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint manifest: {error}") from error
    if damaged:
        raise CheckpointError(f"{path}: its digest does not match; the file is damaged")
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    version = manifest.get("format")
    if version not in (WITHOUT_FILES, FORMAT_VERSION):
        raise CheckpointError(
            f"{folder}: format {version}, this version reads {WITHOUT_FILES} and {FORMAT_VERSION}; "
            "continue with the version of megat2i that wrote it"
        )
    problem = _problem(manifest) or _other_step(manifest, folder)
    if problem:
        raise CheckpointError(f"{path}: {problem}; it was not written by a training run")
    return manifest


def write_manifest(folder: Path, content: dict, parts: list[dict], files: dict[str, dict]) -> None:
    """Write the manifest of ``parts`` in ``files``, beside the other ``content`` of it, and make it durable."""
    text = json.dumps({"format": FORMAT_VERSION, **content, "files": files, "parts": parts})
    write_json(folder / MANIFEST, {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text})


def write_json(path: Path, content) -> None:
    """Write a JSON file that is durable, and complete under its name or not there."""
    file = PendingFile(path)
    file.write(json.dumps(content).encode())
    commit([file])


def part_size(part: dict) -> int:
    """Number of values of a part."""
    return sum(prod(b - a for a, b in zip(start, stop, strict=True)) for start, stop in part["boxes"])


def _other_step(manifest: dict, folder: Path) -> str | None:
    if folder.name == f"step-{manifest['step']}":
        return None
    return f"it is the manifest of step {manifest['step']}, in the folder {folder.name}"


def _problem(manifest: dict) -> str | None:
    """What in the manifest has another form than any that was ever written."""
    step, updates, parts = (manifest.get(key) for key in ("step", "optimizer_updates", "parts"))
    if not _is_count(step) or not _is_count(updates) or updates > step:
        return f"step {step!r:.40} with {updates!r:.40} optimizer updates"
    if not isinstance(manifest.get("written_by"), dict):
        return "written_by is not a JSON object"
    if not isinstance(parts, list) or not parts:
        return "parts is not a list of parts"
    for number, part in enumerate(parts):
        if not (isinstance(part, dict) and _is_part(part)):
            return f"part {number} is {part!r:.120}"
    if len({(part["file"], part["key"]) for part in parts}) < len(parts):
        return "a part is listed twice"
    return None if manifest["format"] == WITHOUT_FILES else _files_problem(manifest)


def _files_problem(manifest: dict) -> str | None:
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != {part["file"] for part in manifest["parts"]}:
        return "files does not list the files of the parts"
    for name, file in files.items():
        sizes = [file.get(key) for key in ("bytes", "header_bytes")] if isinstance(file, dict) else []
        if not sizes or not all(map(_is_count, sizes)) or sizes[1] > sizes[0] or not _is_digest(file.get("header")):
            return f"the entry of {name} is {file!r:.120}"
    return None


def _is_part(part: dict) -> bool:
    shape, boxes, file = part.get("shape"), part.get("boxes"), part.get("file")
    return (
        part.get("kind") in KINDS
        and all(isinstance(part.get(key), str) for key in ("name", "key"))
        and isinstance(file, str)
        and FILE_NAME.fullmatch(file) is not None
        and _is_digest(part.get("sha256"))
        and _are_counts(shape)
        and isinstance(boxes, list)
        and all(_is_box(box, shape) for box in boxes)
    )


def _is_box(box, shape: list[int]) -> bool:
    if not isinstance(box, list) or len(box) != 2 or not all(map(_are_counts, box)):
        return False
    if not len(box[0]) == len(box[1]) == len(shape):
        return False
    return all(start < stop <= size for start, stop, size in zip(*box, shape, strict=True))


def _are_counts(values) -> bool:
    return isinstance(values, list) and all(map(_is_count, values))


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_digest(value) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None
