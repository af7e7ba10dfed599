"""Shards in, shards out: a job whose parts are tokenized by many tasks that know nothing of each other.

Every source shard (a tar, a Parquet file, else a part) becomes a finished dataset of its own, PREFIX.shards/NNNNNN. The
folder's job.json, which whoever comes first writes and the others compare with, says which shards there must be and
what they are made with. Each task holds the lock of its share, so no store is ever written by two.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megat2i.data.codebook_use import CodebookUse
from megat2i.data.encode_part import Encoding, open_tokenizers
from megat2i.data.encoders import encode_parts
from megat2i.data.samples import Part
from megat2i.files import DataFileError, PendingFile, fsync_folder, only_run, store_path

JOB = "job.json"
DAY = 24 * 60 * 60


@dataclass(frozen=True)
class ShareSummary:
    """What a task did. ``finished`` of all ``shards`` of the job, its own and those of other tasks, are there."""

    share: range
    samples: int
    refused: int
    codebook: CodebookUse
    finished: int
    shards: int


def share_of(shards: int, index: int, number: int) -> range:
    """The shards of task ``index`` of ``number``."""
    return range(index * shards // number, (index + 1) * shards // number)


def write_share(
    parts: Sequence[Part], prefix: Path, encoding: Encoding, workers: int, index: int, number: int
) -> ShareSummary:
    """Write the shards of task ``index`` of ``number``; ``parts`` are those of the whole job. Raises DataFileError."""
    folder = store_path(prefix, ".shards")
    _, image = open_tokenizers(encoding)
    folder.mkdir(parents=True, exist_ok=True)
    _join_job(folder / JOB, parts, encoding)
    share = share_of(len(parts), index, number)
    stores = [folder / f"{shard:06d}" for shard in range(len(parts))]
    samples, refused, counts = 0, 0, np.zeros(image.codebook_size, np.int64)
    if share:
        with only_run(folder, share.start, len(share)):
            _remove_leftovers(folder, share)
            jobs = [(parts[shard], stores[shard]) for shard in share]
            for _, encoded in encode_parts(jobs, encoding, workers):
                samples, refused = samples + encoded.samples, refused + encoded.refused
                counts += encoded.codebook.counts
    finished = len(stores) - len(_unfinished(stores))
    return ShareSummary(share, samples, refused, CodebookUse(counts), finished, len(stores))


def write_once(path: Path, content: bytes) -> None:
    """Write ``path`` unless it is there with this content; of several tasks that try at once, one does.

    Raises DataFileError where it has other content. Removes what a task that was killed here a day ago left.
    """
    for stray in path.parent.glob(f"{path.name}.*.tmp"):
        with suppress(FileNotFoundError):  # another task was faster
            if time.time() - stray.stat().st_mtime > DAY:
                stray.unlink()
    if not path.exists():
        file = PendingFile(path)
        try:
            file.write(content)
            file.flush_to_disk()
            os.link(file.temporary, path)  # unlike a rename, it never replaces
            fsync_folder(path.parent)
        except FileExistsError:
            pass
        finally:
            file.discard()
    if path.read_bytes() != content:
        remedy = "Remove it if nothing needs it, or choose another output prefix, in another folder"
        raise DataFileError(path, "there is another file of this name, and datasets may depend on it", remedy)


def _join_job(path: Path, parts: Sequence[Part], encoding: Encoding) -> None:
    text, image = open_tokenizers(encoding)
    job = {
        "format_version": 1,
        "text_tokenizer": text.sha256,
        "image_tokenizer": image.sha256,
        "crop": encoding.crop,
        "parts_sha256": hashlib.sha256("\n".join(map(repr, parts)).encode(errors="surrogateescape")).hexdigest(),
        "shards": [part.source for part in parts],
    }
    try:
        write_once(path, json.dumps(job, indent=1).encode() + b"\n")
    except DataFileError as error:
        known = _read_job(path)
        names = ", ".join(name for name in job if known.get(name) != job[name])
        remedy = f"Give every task the same inputs and options, or remove {path.parent}"
        raise DataFileError(path, f"this task is not of the same job: it has other {names}", remedy) from error


def shard_prefixes(folder: Path) -> list[Path]:
    """The stores of a finished job, in order. DataFileError where some are missing."""
    stores, missing = finished_shards(folder)
    if missing:
        raise missing
    return stores


def finished_shards(folder: Path) -> tuple[list[Path], DataFileError | None]:
    """The finished stores of a job, in order, and the error that names the missing ones and how to make them."""
    shards = _read_job(folder / JOB)["shards"]
    stores = [folder / f"{shard:06d}" for shard in range(len(shards))]
    missing = _unfinished(stores)
    if not missing:
        return stores, None
    more = ", ..." if missing[3:] else ""
    some = ", ".join(f"{stores[shard].name} ({shards[shard]})" for shard in missing[:3])
    problem = f"{len(missing)} of {len(shards)} shards are not finished: {some}{more}"
    tasks = "; ".join(f"--shard-index {shard} --num-shards {len(shards)}" for shard in missing[:100])
    remedy = f"Start the same command again, or for these shards alone with {tasks}"
    absent = set(missing)
    finished = [store for shard, store in enumerate(stores) if shard not in absent]
    return finished, DataFileError(folder, problem, remedy)


def _unfinished(stores: Sequence[Path]) -> list[int]:
    """Numbers of the shards that lack a manifest or a ledger."""
    names = set(os.listdir(stores[0].parent)) if stores else set()
    needed = ({f"{store.name}.json", f"{store.name}.ledger.jsonl"} for store in stores)
    return [shard for shard, files in enumerate(needed) if not files <= names]


def _read_job(path: Path) -> dict:
    try:
        job = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataFileError(path, f"not a job ({error})", "Pass the folder that an array job wrote") from error
    if not isinstance(job, dict) or not isinstance(job.get("shards"), list):
        raise DataFileError(path, "not a job: it lists no shards", "Pass the folder that an array job wrote")
    return job


def _remove_leftovers(folder: Path, share: range) -> None:
    """Temporary files of killed tasks among the stores of ``share``."""
    for entry in os.scandir(folder):
        shard = entry.name.split(".")[0]
        if entry.name.endswith(".tmp") and shard.isdecimal() and int(shard) in share:
            os.unlink(entry)
