"""The MMIDIDX reader and writer: exact bytes, refused damage, and no half-written store."""

import gc
import hashlib
import multiprocessing
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megat2i.data import indexed
from megat2i.data.indexed import DTYPES, DataFileError, IndexedDataset, IndexedWriter
from megat2i.data.manifest import digest_file


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def index_bytes(lengths, documents, code, itemsize, modes=None) -> bytes:
    """The .idx by the published layout, written independently of the product."""
    lengths = np.asarray(lengths, "<i4")
    pointers = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1].astype(np.int64) * itemsize, out=pointers[1:])
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    tail = b"" if modes is None else np.asarray(modes, "i1").tobytes()
    return header + lengths.tobytes() + pointers.tobytes() + np.asarray(documents, "<i8").tobytes() + tail


def put(prefix: Path, index: bytes, data: bytes) -> Path:
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(data)
    return prefix


@pytest.mark.parametrize("dtype", [dtype.name for dtype in DTYPES.values()])
def test_round_trip_in_every_dtype(tmp_path, dtype):
    limits = np.iinfo(dtype)
    documents = [([limits.min, 0, limits.max], [1]), ([], [5, 6, 7])]
    with IndexedWriter(tmp_path / "a.b", dtype) as writer:
        for text, image in documents:
            writer.add_document([np.array(text, np.int64), np.array(image)], [0, 1])
    store = IndexedDataset(tmp_path / "a.b")
    assert store.dtype == np.dtype(dtype) and len(store) == 4 and store.number_of_documents == 2
    flat = [tokens for document in documents for tokens in document]
    assert [store.sequence(i).tolist() for i in range(4)] == flat
    assert store.sequence(0).dtype == np.dtype(dtype)
    assert store.read(0, store.token_count).tolist() == sum(flat, [])
    assert store.lengths.tolist() == [3, 1, 0, 3] and store.modes.tolist() == [0, 1, 0, 1]
    assert store.document(1) == range(2, 4) and store.documents.tolist() == [0, 2, 4]
    for call in (store.sequence, store.document):
        for index in (-1, 4):
            with pytest.raises(IndexError):
                call(index)


def test_exact_bytes(tmp_path):
    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add_document([np.array([1, 513]), np.array([3, 4, 5])], [0, 1])
        writer.add_document([np.array([7]), np.array([8])], [0, 1])
    index, data = (tmp_path / "s.idx").read_bytes(), (tmp_path / "s.bin").read_bytes()
    assert data == bytes([1, 0, 1, 2, 3, 0, 4, 0, 5, 0, 7, 0, 8, 0])
    assert index == index_bytes([2, 3, 1, 1], [0, 2, 4], 8, 2, [0, 1, 0, 1])
    assert writer.digests.index_sha256 == hashlib.sha256(index).hexdigest()
    assert writer.digests.bin_blocks == digest_file(tmp_path / "s.bin")
    assert files_of(tmp_path) == {"s.idx", "s.bin"}


def test_store_without_modes_and_empty_store(tmp_path):
    store = IndexedDataset(
        put(tmp_path / "m", index_bytes([2, 1], [0, 1, 2], 4, 4), np.arange(3, dtype="<i4").tobytes())
    )
    assert store.modes is None and store.sequence(1).tolist() == [2]
    with IndexedWriter(tmp_path / "e", np.int32):
        pass
    empty = IndexedDataset(tmp_path / "e")
    assert len(empty) == 0 and empty.number_of_documents == 0 and empty.token_count == 0


def test_plain_text_is_written_without_modes(tmp_path):
    with IndexedWriter(tmp_path / "text", np.uint16) as writer:
        writer.add_document([np.arange(5)], None)
        writer.add_document([np.arange(3)], None)
        with pytest.raises(DataFileError, match="some documents have modes and some have none"):
            writer.add_document([np.arange(3)], [0])
    store = IndexedDataset(tmp_path / "text")
    assert store.modes is None and store.read(0, store.token_count).tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    with IndexedWriter(tmp_path / "pairs", np.uint16) as writer:
        writer.add_document([np.arange(5)], [0])
        with pytest.raises(DataFileError, match="some documents have modes and some have none"):
            writer.add_document([np.arange(3)], None)


def write_many(prefix: Path, documents: int) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(documents):
            writer.add_document([np.zeros(number % 5, np.int64), np.ones(2, np.int64)], [0, 1])


def test_an_index_that_outgrew_memory_has_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "SPOOL_BYTES", 1000)
    monkeypatch.setattr(indexed, "COPY_BYTES", 400)
    write_many(tmp_path / "s", 500)
    lengths = [length for number in range(500) for length in (number % 5, 2)]
    assert (tmp_path / "s.idx").read_bytes() == index_bytes(lengths, range(0, 1001, 2), 8, 2, [0, 1] * 500)
    assert files_of(tmp_path) == {"s.idx", "s.bin"}


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    def peak(name: str, documents: int) -> int:
        tracemalloc.start()
        try:
            write_many(tmp_path / name, documents)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(indexed, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(indexed, "SPOOL_BYTES", 1 << 30)
    growth_in_memory = peak("a", 10_000) - peak("b", 1_000)
    monkeypatch.setattr(indexed, "SPOOL_BYTES", 1 << 12)
    growth = peak("c", 10_000) - peak("d", 1_000)
    assert growth < 20_000 < 9_000 * 18 < growth_in_memory  # 18 bytes of index a document


def test_sequence_outlives_the_store(store, pairs):
    opened = IndexedDataset(store)
    sequence = opened.sequence(1)
    del opened
    gc.collect()
    assert sequence.tolist() == pairs[0][1].tolist()
    sequence[0] = 1  # it is the caller's


def test_an_open_file_that_becomes_shorter_gives_an_error_and_no_zeros(store, pairs):
    """Through a map the last page would hold zeros, and those behind it would kill the process."""
    for suffix in (".bin", ".idx"):
        opened, path = IndexedDataset(store), Path(f"{store}{suffix}")
        content, last = path.read_bytes(), len(opened) - 1
        assert opened.sequence(last).tolist() == pairs[-1][1].tolist()
        for shorter in (len(content) - 2, 2, 0):
            os.truncate(path, shorter)
            message = rf"\{suffix}: {shorter} bytes, {len(content)} when it was opened"
            with pytest.raises(DataFileError, match=message):
                opened.sequence(last)
        path.write_bytes(content)


def test_a_store_that_is_gone_leaves_no_descriptor_open(store):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = descriptors()
    stores = [IndexedDataset(store) for _ in range(20)]
    assert descriptors() == before + 20 * 3  # the .bin, the .idx, and the file under its map
    del stores
    assert descriptors() == before


@pytest.mark.parametrize(
    ("sequences", "modes", "message"),
    [
        ([[1], [66_899]], [0, 1], "66899 do not fit uint16"),
        ([[-1], [1]], [0, 1], "-1 to -1 do not fit uint16"),
        ([np.array([2**63], np.uint64)], [0], "do not fit uint16"),
        ([[0.5], [1]], [0, 1], "dtype float64"),
        ([[[1, 2]], [1]], [0, 1], r"shape \(1, 2\)"),
        ([[True], [1]], [0, 1], "dtype bool"),
        ([[1], [2]], [0], "2 sequences with modes"),
        ([[1], [2]], [0, 2], r"modes \[0, 2\]"),
    ],
)
def test_writer_refuses_a_document_whole(tmp_path, sequences, modes, message):
    """The refused document leaves nothing behind: a caller may log it and go on."""
    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add_document([np.array([1]), np.array([2])], [0, 1])
        with pytest.raises(DataFileError, match=f"document 1: .*{message}"):
            writer.add_document([np.asarray(sequence) for sequence in sequences], modes)
        writer.add_document([np.array([3]), np.array([4])], [0, 1])
    assert IndexedDataset(tmp_path / "s").read(0, 4).tolist() == [1, 2, 3, 4]


def test_writer_refuses_float_dtype_and_complete_store(tmp_path, store_with_manifest):
    with pytest.raises(DataFileError, match="float32 is not one of"):
        IndexedWriter(tmp_path / "f", np.float32)
    with (
        pytest.raises(DataFileError, match=r"with\.manifest\.json: the store is complete already"),
        IndexedWriter(store_with_manifest, np.uint16),
    ):
        pass


def test_exception_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add_document([np.array([1])], [0])
        assert any(name.endswith(".tmp") for name in files_of(tmp_path))
        raise KeyError
    assert files_of(tmp_path) == set()


def write_until_killed(prefix, ready):
    indexed.SPOOL_BYTES = 64  # the index is on the disk, too, when the signal comes
    with IndexedWriter(prefix, np.uint16) as writer:
        while True:
            writer.add_document([np.arange(1000)], [0])
            ready.set()


def test_killed_writer_leaves_nothing_under_the_stores_name(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=write_until_killed, args=(tmp_path / "s", ready))
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert all(name.endswith(".tmp") for name in files_of(tmp_path))
    with pytest.raises(DataFileError, match=r"s\.idx: not found"):
        IndexedDataset(tmp_path / "s")


CRASH_AT = """
import os, sys
import numpy as np
from megat2i.data.indexed import IndexedWriter
seen = 0
def crash(event, args):
    global seen
    if event in ("os.rename", "os.remove"):
        if seen == int(sys.argv[2]):
            os._exit(9)
        seen += 1
writer = IndexedWriter(sys.argv[1], np.uint16)
with writer:
    writer.add_document([np.array([2, 2, 2])], [0])
    sys.addaudithook(crash)
"""


def test_crash_while_replacing_a_store_never_mixes_old_and_new(tmp_path):
    """Die at every rename and removal of a commit over an older store of the same shape."""
    outcomes = []
    for crash_at in range(6):
        prefix = tmp_path / str(crash_at)
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add_document([np.array([1]), np.array([1, 1])], [0, 1])
        ended = subprocess.run([sys.executable, "-c", CRASH_AT, str(prefix), str(crash_at)], check=False)
        assert ended.returncode in (0, 9)
        try:
            store = IndexedDataset(prefix)
        except DataFileError as error:
            outcomes.append("refused" if "not found" in str(error) else str(error))
        else:
            outcomes.append((store.lengths.tolist(), store.read(0, store.token_count).tolist()))
        if ended.returncode == 0:
            break
    assert (tmp_path / "2.bin").read_bytes() == b"\2\0" * 3  # the .bin gets its name before the .idx does
    old, new = ([1, 2], [1, 1, 1]), ([3], [2, 2, 2])
    assert outcomes == [old, "refused", "refused", new, new, new]
    # Control: the state that the order of the commit rules out would open without complaint.
    (tmp_path / "3.idx").write_bytes((tmp_path / "0.idx").read_bytes())
    assert IndexedDataset(tmp_path / "3").sequence(0).tolist() == [2]


def spoil(data: bytes, at: int, replacement: bytes) -> bytes:
    return data[:at] + replacement + data[at + len(replacement) :]


LENGTHS, POINTERS, DOCUMENTS, MODES = 34, 34 + 4 * 4, 34 + 12 * 4, 34 + 12 * 4 + 8 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index[:20], "20 bytes are too short"),
        (lambda index: b"", "0 bytes are too short"),
        (lambda index: index[:-1], "4 sequences and 2 documents need 106, or 110 with modes"),
        (lambda index: index + b"\0", "111 bytes"),
        (lambda index: spoil(index, 0, b"X"), "not MMIDIDX version 1"),
        (lambda index: spoil(index, 9, b"\2"), "version 2"),
        (lambda index: spoil(index, 17, b"\7"), "dtype code 7"),
        (lambda index: spoil(index, 18, b"\xff" * 16), "18,446,744,073,709,551,615 sequences"),
        (lambda index: spoil(index, 18, struct.pack("<QQ", 2**62, 3)), "4,611,686,018,427,387,904 sequences"),
        (lambda index: spoil(index, 26, bytes(8)), "list of document bounds is empty"),
        (lambda index: spoil(index, LENGTHS + 4, struct.pack("<i", -3)), "sequence 1 has length -3"),
        (lambda index: spoil(index, LENGTHS + 4, struct.pack("<i", 4)), "offset of sequence 2 is not the sum"),
        (lambda index: spoil(index, POINTERS + 8, struct.pack("<q", 6)), "offset of sequence 1 is not the sum"),
        (lambda index: spoil(index, POINTERS, struct.pack("<q", -2)), "offset of sequence 0 is not the sum"),
        (lambda index: spoil(index, DOCUMENTS, struct.pack("<q", 1)), "do not rise from 0 to 4"),
        (lambda index: spoil(index, DOCUMENTS + 8, struct.pack("<q", 2**62)), "do not rise from 0 to 4"),
        (lambda index: spoil(index, DOCUMENTS + 16, struct.pack("<q", 5)), "do not rise from 0 to 4"),
        (lambda index: spoil(index, MODES + 1, b"\2"), "mode other than"),
        (lambda index: spoil(index, MODES + 1, b"\xff"), "mode other than"),
        (
            lambda index: spoil(index, LENGTHS + 12, struct.pack("<i", 2**31 - 1)),
            r"s\.bin: 14 bytes, its index describes",
        ),
    ],
)
def test_damaged_index_is_refused(tmp_path, change, message):
    index = index_bytes([2, 3, 1, 1], [0, 2, 4], 8, 2, [0, 1, 0, 1])
    assert len(index) == MODES + 4
    IndexedDataset(put(tmp_path / "s", index, bytes(14)))  # control: the whole index opens
    with pytest.raises(DataFileError, match=message) as caught:
        IndexedDataset(put(tmp_path / "s", change(index), bytes(14)))
    assert str(tmp_path / "s") in str(caught.value) and caught.value.remedy


def test_bin_of_wrong_size_or_missing_is_refused_before_mapping(tmp_path):
    index = index_bytes([2**31 - 1] * 4, [0, 4], 5, 8)
    with pytest.raises(DataFileError, match="14 bytes, its index describes 68,719,476,704"):
        IndexedDataset(put(tmp_path / "s", index, bytes(14)))
    index = index_bytes([3], [0, 1], 8, 2)
    for size in (0, 5, 7):
        with pytest.raises(DataFileError, match=f"s.bin: {size} bytes, its index describes 6"):
            IndexedDataset(put(tmp_path / "s", index, bytes(size)))
    (tmp_path / "s.bin").unlink()
    with pytest.raises(DataFileError, match=r"s\.bin: not found"):
        IndexedDataset(tmp_path / "s")


def test_error_crosses_a_process_boundary():
    error = pickle.loads(pickle.dumps(DataFileError("a.idx", "is wrong", "Repair it")))
    assert str(error) == "a.idx: is wrong. Repair it" and isinstance(error, ValueError)


def mutate(index: bytes, chance: random.Random) -> bytes:
    """One random damage: bytes replaced, a bit flipped, a count replaced by an extreme, cut short, or lengthened."""
    kind, at = chance.random(), chance.randrange(len(index))
    if kind < 0.5:
        return spoil(index, at, chance.randbytes(chance.randint(1, 4)))[: len(index)]
    if kind < 0.8:
        return spoil(index, at, bytes([index[at] ^ 1 << chance.randrange(8)]))
    if kind < 0.9:
        extreme = chance.choice([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, chance.randrange(60)])
        return spoil(index, chance.choice([18, 26]), struct.pack("<Q", extreme))
    return index[:at] if kind < 0.95 else index + chance.randbytes(chance.randint(1, 60))


@pytest.mark.parametrize("mutants", [10_000, pytest.param(200_000, marks=pytest.mark.full)])
def test_damaged_indices(store_with_manifest, tmp_path, mutants):
    """Without a manifest all that can slip through is what the format cannot show; with one, nothing at all."""
    index = Path(f"{store_with_manifest}.idx").read_bytes()
    original, plain = IndexedDataset(store_with_manifest), tmp_path / "plain"
    expected = [original.sequence(number).tobytes() for number in range(len(original))]
    os.link(f"{store_with_manifest}.bin", f"{plain}.bin")
    os.link(f"{store_with_manifest}.idx", f"{plain}.idx")
    documents_start = 34 + 12 * len(original)
    unprovable = {17, *range(documents_start, len(index))}  # dtype code, document bounds, modes
    chance, accepted, refused = random.Random(0), 0, 0
    with open(f"{plain}.idx", "r+b", buffering=0) as file:  # in place: also the .idx beside the manifest
        for _ in range(mutants):
            mutant = mutate(index, chance)
            if mutant == index:
                continue
            file.seek(0)
            file.write(mutant)
            if os.fstat(file.fileno()).st_size != len(mutant):
                file.truncate()
            with pytest.raises(DataFileError):
                IndexedDataset(store_with_manifest)
            try:
                store = IndexedDataset(plain)
            except DataFileError:
                refused += 1
                continue
            accepted += 1
            if len(mutant) != len(index):  # cut exactly where the modes begin: a file as Megatron writes text
                assert mutant == index[: -len(original)] and store.modes is None
            changed = {at for at in range(len(mutant)) if mutant[at] != index[at]}
            assert changed <= unprovable and store.dtype.itemsize == original.dtype.itemsize
            for sequence in range(len(store)):  # in bounds, and the same bytes
                assert store.sequence(sequence).tobytes() == expected[sequence]
    assert refused > 0.7 * mutants and accepted > 20, (refused, accepted)


def test_control_without_the_structure_check_damage_gives_wrong_tokens(store):
    class Unchecked(IndexedDataset):
        def _check_structure(self):
            return os.path.getsize(self.bin_path)

    index, original = Path(f"{store}.idx").read_bytes(), IndexedDataset(store)
    expected, chance, wrong = [original.sequence(i).tolist() for i in range(8)], random.Random(1), 0
    for _ in range(300):
        Path(f"{store}.idx").write_bytes(spoil(index, chance.randrange(34, 34 + 96), chance.randbytes(1)))
        with suppress(DataFileError, ValueError):  # beyond the end of the file, or less than no token
            wrong += [Unchecked(store).sequence(i).tolist() for i in range(8)] != expected
    assert wrong > 20


def test_ten_million_sequences(tmp_path):
    count = 10_000_000
    modes = np.tile(np.array([0, 1], np.int8), count // 2)
    index = index_bytes(np.full(count, 1, np.int32), np.arange(0, count + 1, 2), 1, 1, modes)
    put(tmp_path / "s", index, bytes(count))
    del index, modes
    store = IndexedDataset(tmp_path / "s")
    assert len(store) == count and store.sequence(count - 1).tolist() == [0]
    # The check works in blocks: damage in a late block is found, too.
    late = indexed.CHECK_SEQUENCES * 5 + 3
    with open(tmp_path / "s.idx", "r+b") as file:
        file.seek(34 + 4 * count + 8 * late)
        file.write(struct.pack("<q", late + 1))
    with pytest.raises(DataFileError, match=f"offset of sequence {late} "):
        IndexedDataset(tmp_path / "s")
