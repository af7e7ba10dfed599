"""The preprocessing engine: captioned images in, a token store with its manifest and ledger out.

The input is cut into parts (``sources.find_parts``) that depend on the input alone; worker processes turn each into a
small store in PREFIX.parts/ (``encode_part``). When all are there they are merged in order into PREFIX.bin and
PREFIX.idx, the ledger follows, the manifest comes last and declares the dataset complete, and the parts are removed.
So the bytes do not depend on the number of workers, a run that was killed goes on where it was, and nothing half-done
looks complete.
"""

import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megat2i.data.encode_part import EncodedPart, Encoding, encode_part, open_tokenizers, read_refused, use_device
from megat2i.data.indexed import StoreDigests, merge
from megat2i.data.manifest import Manifest, Source, TokenCounts
from megat2i.data.samples import Part
from megat2i.data.sources import source_bytes
from megat2i.files import DataFileError, PendingFile, commit, store_path


@dataclass(frozen=True)
class Summary:
    """What a job did. ``ledger`` lists every refused sample."""

    manifest: Manifest
    refused: int
    ledger: Path
    codebook: "CodebookUse"


@dataclass(frozen=True)
class CodebookUse:
    """How a dataset uses its image codes. ``counts``: how often it has each, int64 [codes]."""

    counts: np.ndarray

    @property
    def used(self) -> int:
        """Codes that occur at all."""
        return int(np.count_nonzero(self.counts))

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes' frequencies: as many codes, used evenly, would be as hard to guess."""
        share = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(share * np.log(share)).sum()))

    def content(self) -> bytes:
        """A JSON object of one line."""
        fields = {"codebook_size": len(self.counts), "used": self.used, "perplexity": round(self.perplexity, 3)}
        return json.dumps({**fields, "counts": self.counts.tolist()}).encode() + b"\n"


def preprocess(parts: Sequence[Part], prefix: Path, encoding: Encoding, workers: int, overwrite: bool) -> Summary:
    """Write the dataset ``prefix`` from ``parts`` with ``workers`` processes.

    An existing dataset is replaced only with ``overwrite``, and its files stay whole until the new ones are there.
    Raises DataFileError: for an existing dataset, another run on the same prefix, or inputs with nothing readable.
    """
    check_output(prefix, overwrite)
    folder = store_path(prefix, ".parts")
    open_tokenizers(encoding)  # a bad file is one error here, not one per worker
    folder.mkdir(parents=True, exist_ok=True)
    with _only_run(folder):
        _remove_leftovers(prefix)
        prefixes = [folder / f"{number:06d}" for number in range(len(parts))]
        manifests, codebook = _encode_parts(list(zip(parts, prefixes, strict=True)), encoding, workers)
        ledger = store_path(prefix, ".ledger.jsonl")
        lines = [
            {"source": part.source, "sample": refused.name, "reason": refused.reason}
            for part, part_prefix in zip(parts, prefixes, strict=True)
            for refused in read_refused(part_prefix)
        ]
        documents = sum(manifest.documents for manifest in manifests)
        if documents:
            store_path(prefix, ".json").unlink(missing_ok=True)  # with --overwrite: it describes what now goes
            digests = merge(prefixes, prefix)
            _write_file(ledger, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            _write_file(store_path(prefix, ".codebook.json"), codebook.content())
            manifest = _whole_manifest(parts, manifests, prefix, encoding, digests)
            manifest.write(prefix)
        else:
            _write_file(ledger, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        shutil.rmtree(folder)
    if not documents:
        first = f"the first: {lines[0]['sample']}: {lines[0]['reason']}" if lines else "they are empty"
        raise DataFileError(prefix, f"no sample of the inputs can be used; {first}", f"{ledger.name} lists them all")
    return Summary(manifest, len(lines), ledger, codebook)


def check_output(prefix: Path, overwrite: bool) -> None:
    """Raise DataFileError where ``prefix`` is taken, unless it may be overwritten."""
    if overwrite:
        return
    manifest = store_path(prefix, ".json")
    if manifest.exists():
        folder = store_path(prefix, ".parts")
        remedy = "Pass --overwrite to replace it, or another prefix"
        if folder.exists():
            remedy += f"; {folder.name}, left by an interrupted run, is only needed to go on with --overwrite"
        raise DataFileError(manifest, "there is a complete dataset", remedy)
    index = store_path(prefix, ".idx")
    if index.exists() and not store_path(prefix, ".parts").exists():
        raise DataFileError(
            index,
            "there is a dataset that this tool did not write",
            "Pass --overwrite to replace it, or another prefix",
        )


@contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """Hold the lock of a parts folder; the system frees it when the process ends, however it ends."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataFileError(folder, "another run is writing this dataset", "Wait for it, or stop it") from error
        yield


def _remove_leftovers(prefix: Path) -> None:
    """Temporary files of a killed run beside the dataset (those among the parts go with the parts)."""
    for suffix in (".bin", ".idx", ".json", ".ledger.jsonl", ".codebook.json"):
        for path in prefix.parent.glob(f"{prefix.name}{suffix}.*.tmp"):
            path.unlink()


def _write_file(path: Path, content: bytes) -> None:
    file = PendingFile(path)
    try:
        file.write(content)
        commit([file])
    finally:
        file.discard()


def _whole_manifest(
    parts: Sequence[Part], manifests: list[Manifest], prefix: Path, encoding: Encoding, digests: StoreDigests
) -> Manifest:
    """The manifests of the parts as one."""

    def extreme(choose, modality: str, name: str) -> int | None:
        values = [getattr(getattr(manifest, modality), name) for manifest in manifests]
        return choose((value for value in values if value is not None), default=None)

    samples = dict.fromkeys((part.source for part in parts), 0)
    for part, manifest in zip(parts, manifests, strict=True):
        samples[part.source] += manifest.documents
    # The real paths: where the folder is a link, ".." leads from what it points to.
    home = os.path.realpath(prefix.parent)
    return replace(
        manifests[0],
        documents=sum(manifest.documents for manifest in manifests),
        sequences=sum(manifest.sequences for manifest in manifests),
        tokens=TokenCounts(sum(m.tokens.text for m in manifests), sum(m.tokens.image for m in manifests)),
        text=replace(
            manifests[0].text,
            min_id=extreme(min, "text", "min_id"),
            max_id=extreme(max, "text", "max_id"),
            tokenizer=os.path.relpath(os.path.realpath(encoding.text_tokenizer), home),
        ),
        image=replace(
            manifests[0].image,
            min_code=extreme(min, "image", "min_code"),
            max_code=extreme(max, "image", "max_code"),
            tokenizer=os.path.relpath(os.path.realpath(encoding.image_tokenizer), home),
        ),
        sources=tuple(
            Source(Path(os.path.abspath(source)).name, number, size=source_bytes(source))
            for source, number in samples.items()
        ),
        index_sha256=digests.index_sha256,
        bin_blocks=digests.bin_blocks,
    )


class _Progress:
    """The progress bar. The total is estimated while there are parts (tar shards) whose number is not known."""

    def __init__(self, parts: Sequence[Part]):
        self._known = sum(part.expected for part in parts if part.expected is not None)
        self._unknown = sum(part.expected is None for part in parts)
        self._counted, self._samples = 0, 0
        total = None if self._unknown else self._known
        interval = 0.2 if sys.stderr.isatty() else 10.0  # in a log file every refresh is a line
        self.bar = tqdm(total=total, unit=" images", smoothing=0.05, mininterval=interval)

    def part_done(self, part: Part, samples: int) -> None:
        if part.expected is None:
            self._counted, self._samples = self._counted + 1, self._samples + samples
            self.bar.total = self._known + round(self._samples / self._counted * self._unknown)


def _encode_parts(
    jobs: list[tuple[Part, Path]], encoding: Encoding, workers: int
) -> tuple[list[Manifest], CodebookUse]:
    """(manifests of all parts, in order; use of codes in all of them). One worker is this process itself."""
    progress = _Progress([part for part, _ in jobs])
    run = _run_here(jobs, encoding, progress) if workers == 1 else _run_workers(jobs, encoding, workers, progress)
    manifests: list[Manifest | None] = [None] * len(jobs)
    counts = np.zeros(open_tokenizers(encoding)[1].codebook_size, np.int64)
    refused = 0
    with progress.bar as bar:
        for number, encoded in run:
            manifests[number] = encoded.manifest
            counts += encoded.code_counts  # not kept: there may be hundreds of thousands of parts
            refused += encoded.refused
            bar.set_postfix(refresh=False, refused=refused)
            progress.part_done(jobs[number][0], encoded.manifest.documents + encoded.refused)
    return manifests, CodebookUse(counts)


def _run_here(jobs, encoding: Encoding, progress: _Progress) -> Iterator[tuple[int, EncodedPart]]:
    for number, (part, prefix) in enumerate(jobs):
        yield number, encode_part(part, prefix, encoding, progress.bar.update)


def _run_workers(jobs, encoding, workers: int, progress: _Progress) -> Iterator[tuple[int, EncodedPart]]:
    context = get_context("spawn")  # the same on every platform; forking a process that has threads is not safe
    done_samples, started = context.Value("q", 0), context.Value("i", 0)
    waiting, running = iter(enumerate(jobs)), {}
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (done_samples, started)) as pool:
        try:
            while True:
                for number, (part, prefix) in islice(waiting, 2 * workers - len(running)):
                    running[pool.submit(_work, part, prefix, encoding)] = number
                if not running:
                    return
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                progress.bar.update(done_samples.value - progress.bar.n)
                for future in finished:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            remedy = "Often its memory ran out: use fewer --workers. The same command goes on where it was"
            raise DataFileError(jobs[0][1].parent, "a worker process was killed", remedy) from error
        except BaseException:  # an interruption too: do not wait for the parts that are under way
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_done_samples = None  # in a worker: the shared number of samples done by all


def _start_worker(done_samples, started) -> None:
    global _done_samples
    _done_samples = done_samples
    torch.set_num_threads(1)
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    use_device(number)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for work forever."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _work(part: Part, prefix: Path, encoding: Encoding) -> EncodedPart:
    return encode_part(part, prefix, encoding, _report)


def _report(samples: int) -> None:
    with _done_samples.get_lock():
        _done_samples.value += samples
