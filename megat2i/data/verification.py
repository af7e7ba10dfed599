"""The bytes of a run's datasets are what they were: beside training, every block of a .bin is compared with its digest.

Each rank compares its share of the blocks, those first that the run reads first: a few before the first step, the rest
in a thread that uses DUTY of one processor core. A block's digest is the manifest's. A store without a manifest is
compared with what this run met before: the digests are recorded in the run folder when a block is first read.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import BLOCK_BYTES
from megat2i.files import DataFileError
from megat2i.progress import say

FOLDER = "data_digests"  # in the run folder, of stores without a manifest
DUTY = 0.005  # processor time of the thread for a second of training
PIECE = 1 << 20  # bytes read and hashed at a time
START_BYTES = 1 << 26  # compared before the first step: about 50 ms
JOIN = 5.0  # seconds at most that the end of a run waits for the thread, which storage may hold up
LOOK_EVERY = 1.0  # seconds between two looks whether a file was overwritten, once all is compared

ReadAt = tuple[IndexedDataset, np.ndarray]  # a store, and offsets in its .bin (int64) at which rows begin
Touched = Iterable[Iterable[ReadAt]]  # of each step


class Block(NamedTuple):
    """Bytes ``start`` to ``stop`` of the .bin of ``store``."""

    store: IndexedDataset
    start: int
    stop: int


class Verification:
    """Compares this rank's share of the blocks of ``stores`` with their digests.

    ``problem``: what is wrong with the data, None as long as nothing was noticed. ``verified`` of ``share`` bytes are
    compared, in ``processor_s`` seconds of processor time.
    touched: of each step to come, the stores with the offsets at which it reads.
    """

    def __init__(
        self,
        stores: Iterable[IndexedDataset],
        touched: Callable[[], Touched],
        run_dir: Path,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.stores = list({str(store.bin_path): store for store in stores}.values())
        self._touched, self._rank, self._ranks, self._remark = touched, rank, ranks, ""
        self._record = Record(run_dir / FOLDER, rank)
        self._status = self._statuses()
        self._work = self._pieces(self._in_order())
        self._closed, self._thread = threading.Event(), None
        self.problem: DataFileError | None = None
        self.verified, self.complete, self.processor_s = 0, False, 0.0

    @property
    def share(self) -> int:
        """Bytes that this rank compares in all."""
        return sum(block.stop - block.start for block in self._mine(_file_order(self.stores)))

    def begin(self) -> None:
        """Compare the first START_BYTES. What is wrong with them is the ``problem``."""
        while self.verified < START_BYTES and not self.complete and not self.problem:
            self._advance()

    def go_on(self, remark: str) -> None:
        """Compare the rest in a thread; then watch for files that are overwritten in place.

        ``remark`` follows the remedy of a problem that shows from now on.
        """
        self._remark = f". {remark}"
        self._thread = threading.Thread(target=self._keep_comparing, daemon=True, name="verification")
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread:
            self._thread.join(JOIN)
        self._record.close()

    def summary(self) -> list[str]:
        """How far this rank came, in words; nothing where there was nothing to compare."""
        if not self.share:
            return []
        verified = "all" if self.complete else f"{self.verified / self.share:.0%}"
        of_rank = " of the first rank's share" if self._ranks > 1 else ""
        seconds = f"{self.processor_s:.2g} s of processor time beside training"
        return [f"data: {verified} of {self.share:,} bytes{of_rank} compared with their digests, {seconds}"]

    def _keep_comparing(self) -> None:
        before = time.thread_time()
        while not self.problem:
            self._advance()
            now = time.thread_time()
            pause = (now - before) * (1 / DUTY - 1)
            self.processor_s += now - before
            before = now
            if self._closed.wait(max(pause, LOOK_EVERY) if self.complete else pause):
                return

    def _advance(self) -> None:
        """Compare one more piece, from the beginning again where a file was changed."""
        try:
            status = self._statuses()
            if status != self._status:
                self._status, self.complete, self.verified = status, False, 0
                self._work = self._pieces(self._mine(_file_order(self.stores)))
                for store in self.stores:
                    store.verify_index()
            if not self.complete:
                self.complete = next(self._work, None) is None
        except DataFileError as error:
            self.problem = error

    def _statuses(self) -> list[list[tuple[int, int]]]:
        return [store.status() for store in self.stores]

    def _in_order(self) -> Iterator[Block]:
        """This rank's share of all blocks, those first that the steps to come read first."""
        return self._mine(_first_touch_order(self.stores, self._touched()))

    def _mine(self, blocks: Iterator[Block]) -> Iterator[Block]:
        return islice(blocks, self._rank, None, self._ranks)

    def _pieces(self, blocks: Iterator[Block]) -> Iterator[int]:
        """Compare ``blocks``, and yield the bytes of each piece of the work."""
        buffer = np.empty(PIECE, np.uint8)
        for block in blocks:
            digest = hashlib.sha256()
            for offset in range(block.start, block.stop, PIECE):
                piece = buffer[: min(PIECE, block.stop - offset)]
                block.store.read_bytes(offset, piece)
                digest.update(piece)
                if offset + len(piece) == block.stop:
                    self._compare(block, digest.hexdigest())
                self.verified += len(piece)
                yield len(piece)

    def _compare(self, block: Block, sha256: str) -> None:
        manifest, bytes_in_words = block.store.manifest, f"bytes {block.start:,} to {block.stop - 1:,}"
        if manifest:
            expected = manifest.bin_blocks.sha256[block.start // manifest.bin_blocks.block_bytes]
            problem = f"{bytes_in_words} differ from the manifest's digest"
            remedy = "Copy the file again, then continue with --resume"
        else:
            expected = self._record.digest(block, sha256)
            problem = f"{bytes_in_words} are not those that this run read before"
            remedy = f"Put them back, or remove {self._record.folder} to go on with these, then continue with --resume"
        if sha256 != expected:
            raise DataFileError(block.store.bin_path, problem, remedy + self._remark)


def _block_bytes(store: IndexedDataset) -> int:
    return store.manifest.bin_blocks.block_bytes if store.manifest else BLOCK_BYTES


def _block(store: IndexedDataset, number: int) -> Block:
    size = store.token_count * store.dtype.itemsize
    return Block(store, number * _block_bytes(store), min((number + 1) * _block_bytes(store), size))


def _file_order(stores: list[IndexedDataset]) -> Iterator[Block]:
    for store in stores:
        blocks = -(-store.token_count * store.dtype.itemsize // _block_bytes(store))
        yield from (_block(store, number) for number in range(blocks))


def _first_touch_order(stores: list[IndexedDataset], touched: Touched) -> Iterator[Block]:
    """All blocks, first those that the steps read, step by step until one reads nothing new; the rest in file order."""
    by_path = {str(store.bin_path): store for store in stores}
    seen: set[tuple[str, int]] = set()
    for step in touched:
        before = len(seen)
        for store, offsets in step:
            path = str(store.bin_path)
            for number in np.unique(offsets // _block_bytes(store)).tolist():
                if (path, number) not in seen:
                    seen.add((path, number))
                    yield _block(by_path[path], number)
        if len(seen) == before:
            break
    for block in _file_order(stores):
        if (str(block.store.bin_path), block.start // _block_bytes(block.store)) not in seen:
            yield block


class Record:
    """Digests of blocks as a run first read them: a file of JSON lines for each rank, read by all that come later."""

    def __init__(self, folder: Path, rank: int):
        self.folder = folder
        self._path, self._file, self._failed = folder / f"rank-{rank:05d}.jsonl", None, False
        self._known: dict[tuple, str] = {}
        for path in sorted(folder.glob("rank-*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    *key, sha256 = json.loads(line)
                    self._known.setdefault(tuple(key), sha256)
                except (ValueError, TypeError):  # the line that was being written when the run was killed
                    continue

    def digest(self, block: Block, sha256: str) -> str:
        """The recorded digest of ``block``; ``sha256`` is recorded where there is none."""
        key = (str(block.store.prefix), block.start, block.stop)
        if key not in self._known:
            self._known[key] = sha256
            self._append([*key, sha256])
        return self._known[key]

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _append(self, entry: list) -> None:
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
            # After a line that a kill cut short, this one begins a new one.
            self._file.write(b"\n" + json.dumps(entry).encode() + b"\n")
        except OSError as error:  # such as a full disk: no reason to end a training
            if not self._failed:
                say(f"{self._path}: cannot be written ({error.strerror}); a resumed run cannot compare all of its data")
            self._failed = True
