"""Token sequences on disk in Megatron's MMIDIDX format: read them, and write them.

PREFIX.bin holds the tokens of all sequences end to end. PREFIX.idx says where each begins, which sequences form a
document and, for stores of text and images, the mode (0 text, 1 image) of each. All numbers are little-endian:

    magic (9 bytes), version uint64, dtype code uint8, sequence count S uint64, document count + 1 uint64 (D),
    lengths int32[S], byte offsets int64[S], first sequence of each document and S int64[D], optionally modes int8[S]
"""

import hashlib
import mmap
import os
import struct
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megat2i.data.manifest import REBUILD, BlockDigester, BlockDigests, Manifest
from megat2i.files import DataFileError, PendingFile, commit, store_path

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floats, and Megatron and GPT-NeoX disagree on which is which; token ids are integers.
DTYPES = {code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))}
CHECK_SEQUENCES = 1 << 17  # sequences per step of the structure check: bounds its memory
COPY_BYTES = 1 << 22  # copied at a time; a multiple of every item's size
SPOOL_BYTES = 1 << 22  # of each array of a growing index that stay in memory
MAXIMUM_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class StoreDigests:
    """What a manifest needs to know of the bytes written, taken in memory on their way to the disk."""

    index_sha256: str
    bin_blocks: BlockDigests


class IndexedDataset:
    """A store opened for reading. The index is memory-mapped; nothing is copied at opening.

    Tokens are read, not mapped: a .bin that becomes shorter while it is open would kill the process by its map, or give
    zeros. The index is mapped, and its size is looked at before a row is read. Attributes: ``lengths`` int32[S],
    ``documents`` int64[D] (document d is sequences documents[d]..documents[d+1]-1), ``modes`` int8[S] or None,
    ``token_count``, ``dtype``, ``manifest`` or None.

    Raises DataFileError where a file is missing or its structure is not exactly what the format says, and, for a store
    with a manifest, where the .idx is not the one that the manifest was written for.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        self.index_path, self.bin_path = store_path(prefix, ".idx"), store_path(prefix, ".bin")
        self.manifest = Manifest.read(prefix)
        if self.manifest is not None:
            self.manifest.verify(prefix, data=False)
        self._idx = _open_file(self.index_path)
        weakref.finalize(self, os.close, self._idx)
        self._index = index = _map_file(self._idx)
        self.dtype, sequences, bounds, has_modes = _read_header(self.index_path, index)
        at = HEADER.size
        self.lengths = np.frombuffer(index, "<i4", sequences, at)
        self._pointers = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        self.documents = np.frombuffer(index, "<i8", bounds, at + 12 * sequences)
        self.modes = np.frombuffer(index, "i1", sequences, at + 12 * sequences + 8 * bounds) if has_modes else None
        token_bytes = self._check_structure()
        self.token_count = token_bytes // self.dtype.itemsize
        self._bin = _open_file(self.bin_path, token_bytes)
        weakref.finalize(self, os.close, self._bin)
        self._check_manifest()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def number_of_documents(self) -> int:
        return len(self.documents) - 1

    def document(self, document: int) -> range:
        """Indices of the sequences of a document."""
        if not 0 <= document < self.number_of_documents:
            raise IndexError(f"{self.prefix}: document {document} of {self.number_of_documents}")
        return range(self.documents[document], self.documents[document + 1])

    def sequence(self, index: int) -> np.ndarray:
        """Tokens of a sequence, in the dtype of the file."""
        return self.sequences(index, 1)[0]

    def sequences(self, first: int, count: int) -> list[np.ndarray]:
        """Tokens of ``count`` adjacent sequences, in the dtype of the file, by one read."""
        if not 0 <= first <= first + count <= len(self.lengths):
            raise IndexError(f"{self.prefix}: sequences {first} to {first + count - 1} of {len(self)}")
        self._require_index()
        lengths = self.lengths[first : first + count].tolist()
        tokens = self.read(int(self._pointers[first]) // self.dtype.itemsize, sum(lengths))
        parts, end = [], 0
        for length in lengths:
            parts.append(tokens[end : end + length])
            end += length
        return parts

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` tokens from number ``start`` of all on.

        Raises DataFileError where the .bin cannot be read, or became shorter since it was opened.
        """
        tokens = np.empty(count, self.dtype)
        self.read_bytes(start * self.dtype.itemsize, tokens)
        return tokens

    def read_bytes(self, offset: int, buffer) -> None:
        """Fill ``buffer`` with the bytes of the .bin from ``offset`` on; raises as ``read`` does."""
        try:
            done = os.preadv(self._bin, [buffer], offset)
            size = buffer.nbytes
            while done < size:  # also where the kernel ends a long read early
                more = os.preadv(self._bin, [memoryview(buffer).cast("B")[done:]], offset + done)
                if not more:
                    now, then = os.fstat(self._bin).st_size, self.token_count * self.dtype.itemsize
                    raise _other_size(self.bin_path, now, then)
                done += more
        except OSError as error:
            raise _storage_error(self.bin_path, error) from error

    def status(self) -> list[tuple[int, int]]:
        """Size in bytes and time of the last change (ns) of the open .bin and .idx; who overwrites one changes them."""
        try:
            files = [os.fstat(self._bin), os.fstat(self._idx)]
        except OSError as error:
            raise _storage_error(self.bin_path, error) from error
        return [(file.st_size, file.st_mtime_ns) for file in files]

    def verify_index(self) -> None:
        """Compare the open .idx, as it is now, with its manifest, where there is one. Raises DataFileError."""
        if self.manifest is None:
            return
        digest = hashlib.sha256()
        try:
            for offset in range(0, len(self._index), COPY_BYTES):
                digest.update(os.pread(self._idx, COPY_BYTES, offset))
        except OSError as error:
            raise _storage_error(self.index_path, error) from error
        if digest.hexdigest() != self.manifest.index_sha256:
            problem = "was overwritten since it was opened, with other bytes"
            raise DataFileError(self.index_path, problem, "Copy the file again, then continue with --resume")

    def _require_index(self) -> None:
        now, then = self._index.size(), len(self._index)
        if now != then:
            raise _other_size(self.index_path, now, then)

    def byte_offsets(self, sequences: np.ndarray) -> np.ndarray:
        """Where in the .bin the ``sequences`` (numbers [n]) begin, int64 [n]."""
        self._require_index()
        return self._pointers[sequences]

    def _check_structure(self) -> int:
        """Check every array of the index; returns the bytes that the .bin must have."""
        total = 0  # a Python int: sums of damaged lengths may pass 2^63
        for start in range(0, len(self.lengths), CHECK_SEQUENCES):
            lengths = self.lengths[start : start + CHECK_SEQUENCES].astype(np.int64)
            if lengths.min() < 0:
                self._refuse(f"sequence {start + int(lengths.argmin())} has length {lengths.min()}")
            ends = np.cumsum(lengths * self.dtype.itemsize)
            expected = ends - lengths * self.dtype.itemsize + total
            wrong = self._pointers[start : start + CHECK_SEQUENCES] != expected
            if wrong.any():
                self._refuse(
                    f"the offset of sequence {start + int(wrong.argmax())} is not the sum of the lengths before"
                )
            total += int(ends[-1])
            self.release()
        documents, rise = self.documents, True
        for start in range(0, len(documents), CHECK_SEQUENCES):
            some = documents[start : start + CHECK_SEQUENCES + 1]
            rise = rise and not (some[1:] < some[:-1]).any()
            self.release()
        if documents[0] != 0 or documents[-1] != len(self) or not rise:
            self._refuse(f"document bounds do not rise from 0 to {len(self)}, the number of sequences")
        if self.modes is not None and self.modes.size and self.modes.view(np.uint8).max() > 1:
            self._refuse("a sequence has a mode other than 0 (text) and 1 (image)")
        self.release()
        return total

    def release(self) -> None:
        """Let go of the pages of the index that were read; they come back from the file when they are needed."""
        self._index.madvise(mmap.MADV_DONTNEED)

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        for field, found in (
            ("documents", self.number_of_documents),
            ("sequences", len(self)),
            ("dtype", self.dtype.name),
        ):
            if getattr(self.manifest, field) != found:
                path, said = store_path(self.prefix, ".json"), getattr(self.manifest, field)
                raise DataFileError(path, f"{field} is {said}, {self.index_path.name} has {found}", REBUILD)

    def _refuse(self, problem: str):
        raise DataFileError(self.index_path, problem, REBUILD)


def _storage_error(path: Path, error: OSError) -> DataFileError:
    remedy = "Find the fault of the storage, then continue with --resume"
    return DataFileError(path, f"cannot be read ({error.strerror})", remedy)


def _other_size(path: Path, now: int, then: int) -> DataFileError:
    remedy = "Copy the file again; a training goes on with --resume"
    return DataFileError(path, f"{now:,} bytes, {then:,} when it was opened", remedy)


def _open_file(path: Path, expected_bytes: int | None = None) -> int:
    """The descriptor of a file opened for reading, of ``expected_bytes`` if they are given."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        remedy = "Check the prefix; a .bin without an .idx is left by a writer that did not finish"
        raise DataFileError(path, "not found", remedy) from error
    size = os.fstat(descriptor).st_size
    if expected_bytes is not None and size != expected_bytes:
        os.close(descriptor)
        raise DataFileError(path, f"{size:,} bytes, its index describes {expected_bytes:,}", REBUILD)
    return descriptor


def _map_file(descriptor: int) -> mmap.mmap | bytes:
    """A read-only map of an open file."""
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if os.fstat(descriptor).st_size else b""


def _read_header(path: Path, index) -> tuple[np.dtype, int, int, bool]:
    """(dtype, sequences, document bounds, whether there are modes), each proved by the exact length of the file."""
    if len(index) < HEADER.size:
        raise DataFileError(path, f"{len(index)} bytes are too short for a header of {HEADER.size}", REBUILD)
    magic, version, code, sequences, bounds = HEADER.unpack(index[: HEADER.size])
    if magic != MAGIC or version != 1:
        raise DataFileError(path, f"magic {magic!r} and version {version} are not MMIDIDX version 1", REBUILD)
    if code not in DTYPES:
        raise DataFileError(path, f"dtype code {code} is no integer type of {sorted(DTYPES)}", REBUILD)
    if bounds < 1:
        raise DataFileError(path, "the list of document bounds is empty", REBUILD)
    plain = HEADER.size + 12 * sequences + 8 * bounds  # Python ints: damaged counts cannot wrap
    if len(index) not in (plain, plain + sequences):
        problem = f"{len(index):,} bytes; {sequences:,} sequences and {bounds - 1:,} documents need {plain:,}"
        raise DataFileError(path, f"{problem}, or {plain + sequences:,} with modes", REBUILD)
    # Nothing in the header tells whether modes were written. A store without sequences counts as one without modes.
    return DTYPES[code], sequences, bounds, len(index) > plain


class IndexedWriter:
    """Writes a store; use as a context manager. Nothing appears under ``prefix`` before the block ends cleanly.

    Then .bin and .idx are durable under their own names, and ``digests`` (StoreDigests) is set for the manifest. An
    exception inside the block removes the temporary files. A complete store (one with a manifest) is not overwritten.
    """

    def __init__(self, prefix: str | Path, dtype):
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        self._bin_path = store_path(prefix, ".bin")
        self._code = next((code for code, known in DTYPES.items() if known == self.dtype), None)
        if self._code is None:
            known = ", ".join(known.name for known in DTYPES.values())
            raise DataFileError(self._bin_path, f"dtype {self.dtype} is not one of {known}", "Choose one of these")
        self._limits = np.iinfo(self.dtype)
        self._digester = BlockDigester()
        self.digests: StoreDigests | None = None

    def __enter__(self) -> "IndexedWriter":
        manifest = store_path(self.prefix, ".json")
        if manifest.exists():
            raise DataFileError(manifest, "the store is complete already", "Remove this file to write it again")
        self._file, self._index = PendingFile(self._bin_path), GrowingIndex(self._bin_path.parent)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self.digests = commit_store(self._file, self._digester, self._code, self._index)
        finally:
            self._index.close()
            self._file.discard()

    def add_document(self, sequences: Sequence[np.ndarray], modes: Sequence[int] | None) -> None:
        """Append one document: integer arrays of one dimension, and the mode (0 text, 1 image) of each.

        ``modes`` of None, for every document: a store of plain text, which has no modes. Raises DataFileError, with
        nothing of the document written, where an id does not fit the dtype or a mode is neither 0 nor 1.
        """
        index = self._index
        if modes is None and not index.modes.tell():
            modes = ()
        elif modes is None or index.modes.tell() != index.sequences:
            self._refuse("some documents have modes and some have none", "Give modes for all or for none")
        elif len(sequences) != len(modes) or not all(mode in (0, 1) for mode in modes):
            self._refuse(f"{len(sequences)} sequences with modes {list(modes)}", "Give each sequence mode 0 or 1")
        arrays = [self._checked(sequence) for sequence in sequences]
        for tokens in arrays:
            data = tokens.tobytes()
            self._digester.update(data)  # before the write: damage on the way to the disk then shows
            self._file.write(data)
        index.lengths.write(struct.pack(f"<{len(arrays)}i", *map(len, arrays)))
        index.documents.write(struct.pack("<q", index.sequences))
        index.modes.write(bytes(map(int, modes)))

    def _checked(self, sequence) -> np.ndarray:
        tokens = np.asarray(sequence)
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
            problem = f"a sequence of shape {tokens.shape} and dtype {tokens.dtype}"
            self._refuse(problem, "Token ids are integer arrays of one dimension")
        if tokens.size > MAXIMUM_LENGTH:
            self._refuse(f"a sequence of {tokens.size:,} tokens", f"The format ends at {MAXIMUM_LENGTH:,}")
        if tokens.size and (tokens.min() < self._limits.min or tokens.max() > self._limits.max):
            problem = f"ids {tokens.min()} to {tokens.max()} do not fit {self.dtype.name}"
            self._refuse(problem, "Write the store with a wider dtype")
        return tokens.astype(self.dtype, copy=False)

    def _refuse(self, problem: str, remedy: str):
        raise DataFileError(self._bin_path, f"document {self._index.bounds - 1}: {problem}", remedy)


class GrowingIndex:
    """The arrays of an index as they are written. What is beyond SPOOL_BYTES of each lies in an unnamed file in
    ``folder``, the store's own, so that memory does not grow with the rows."""

    def __init__(self, folder: Path):
        # int32 per sequence; int64 per document, and the 0 before them; int8 per sequence, or nothing
        self.lengths, self.documents, self.modes = (
            tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=folder)  # noqa: SIM115 (closed by close)
            for _ in range(3)
        )
        self.documents.write(bytes(8))

    @property
    def sequences(self) -> int:
        return self.lengths.tell() // 4

    @property
    def bounds(self) -> int:
        """Documents + 1."""
        return self.documents.tell() // 8

    def content(self, code: int) -> Iterator[bytes | np.ndarray]:
        """The bytes of the .idx, piece by piece; nothing can be added after."""
        yield HEADER.pack(MAGIC, 1, code, self.sequences, self.bounds)
        yield from _pieces(self.lengths)
        end = 0
        for piece in _pieces(self.lengths):
            sizes = np.frombuffer(piece, "<i4").astype(np.int64) * DTYPES[code].itemsize
            ends = np.cumsum(sizes) + end
            yield (ends - sizes).astype("<i8", copy=False)
            end = int(ends[-1])
        yield from _pieces(self.documents)
        yield from _pieces(self.modes)

    def close(self) -> None:
        for file in (self.lengths, self.documents, self.modes):
            file.close()


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while piece := file.read(COPY_BYTES):
        yield piece


def commit_store(file: PendingFile, digester: BlockDigester, code: int, index: GrowingIndex) -> StoreDigests:
    """Write the index for the finished .bin ``file`` and give both their names, the .bin first."""
    index_file = PendingFile(file.path.with_name(file.path.name.removesuffix(".bin") + ".idx"))
    digest = hashlib.sha256()
    try:
        for piece in index.content(code):
            digest.update(piece)
            index_file.write(piece)
        commit([file, index_file], [index_file.path.with_suffix(".json")])  # an old manifest describes what goes now
    finally:
        index_file.discard()
    return StoreDigests(digest.hexdigest(), digester.result())
