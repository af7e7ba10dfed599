"""Beside training each block is compared, first those that are read first; what differs is named, at little cost."""

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest

from megat2i.data import verification
from megat2i.data.batches import TrainingData
from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.manifest import Manifest, digest_file
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.data.verification import Verification
from megat2i.vocab import VocabLayout

BLOCK = 100  # bytes: seven blocks in the store of the tests
VOCAB = VocabLayout(text_tokens=300, image_codes=64)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def nothing_touched():
    return ()


@pytest.fixture
def small_blocks(store_with_manifest) -> Path:
    """Prefix of a store of 610 bytes whose manifest has a digest for each BLOCK bytes."""
    blocks = digest_file(Path(f"{store_with_manifest}.bin"), BLOCK)
    dataclasses.replace(Manifest.read(store_with_manifest), bin_blocks=blocks).write(store_with_manifest)
    return store_with_manifest


def begun(prefix, run_dir, touched=nothing_touched, rank=0, ranks=1) -> Verification:
    verified = Verification([IndexedDataset(prefix)], touched, run_dir, rank, ranks)
    verified.begin()
    return verified


def test_every_flipped_byte_is_noticed_and_named(small_blocks, tmp_path):
    path = Path(f"{small_blocks}.bin")
    assert begun(small_blocks, tmp_path).problem is None
    for at in range(0, path.stat().st_size, 7):
        flip(path, at)
        start = at // BLOCK * BLOCK
        problem = str(begun(small_blocks, tmp_path).problem)
        assert problem.startswith(f"{path}: bytes {start} to {min(start + BLOCK, 610) - 1} differ from the manifest's")
        assert "Copy the file again, then continue with --resume" in problem
        flip(path, at)
    assert not (tmp_path / verification.FOLDER).exists()  # the manifest has all digests


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_the_ranks_share_the_blocks(small_blocks, tmp_path, ranks):
    shares = [begun(small_blocks, tmp_path, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sum(share.verified for share in shares) == sum(share.share for share in shares) == 610
    assert max(share.verified for share in shares) <= -(-7 // ranks) * BLOCK
    for block in range(7):
        flip(Path(f"{small_blocks}.bin"), block * BLOCK)
        problems = [begun(small_blocks, tmp_path, rank=rank, ranks=ranks).problem for rank in range(ranks)]
        assert [rank for rank, problem in enumerate(problems) if problem] == [block % ranks]
        flip(Path(f"{small_blocks}.bin"), block * BLOCK)


def test_what_is_read_first_is_compared_first(small_blocks, tmp_path, monkeypatch):
    data = TrainingData([(T2IDataset(small_blocks, VOCAB, 24), 1.0)], seed=3, global_batch_size=2)
    store = data.datasets[0].store
    rows = [sample.row for step in range(20) for sample in data.samples(step)]
    expected = list(dict.fromkeys(int(store.byte_offsets(np.array([2 * row]))[0]) // BLOCK for row in rows[:4]))
    assert len(expected) > 1 and expected != sorted(expected)
    compared = []
    monkeypatch.setattr(Verification, "_compare", lambda self, block, sha256: compared.append(block.start // BLOCK))
    begun(small_blocks, tmp_path, lambda: (data.byte_offsets(step) for step in range(20)))
    assert set(compared[: len(expected)]) == set(expected) and sorted(compared) == list(range(7))


def test_offsets_are_where_rows_begin(small_blocks, tmp_path):
    dataset = T2IDataset(small_blocks, VOCAB, 24)
    for row, offset in enumerate(dataset.byte_offsets(np.arange(len(dataset))).tolist()):
        caption, codes = dataset.store.sequences(2 * row, 2)
        assert np.array_equal(dataset.store.read(offset // 2, len(caption)), caption), (row, codes)
    with IndexedWriter(tmp_path / "text", np.uint16) as writer:
        writer.add_document([np.arange(100)], None)
    windows = T2IDataset(tmp_path / "text", VOCAB, 10, mode="text_only")
    assert [windows.row(row, 0).tokens[0] for row in (0, 4)] == [0, 40]
    assert windows.byte_offsets(np.array([0, 4])).tolist() == [0, 80]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_store_without_manifest_is_compared_with_what_the_run_met_before(store, tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(verification, "BLOCK_BYTES", BLOCK)

    def problems(ranks: int, folder: str = "run") -> list[str]:
        launch = [begun(store, tmp_path / folder, rank=rank, ranks=ranks) for rank in range(ranks)]
        return [str(rank.problem) for rank in launch if rank.problem]

    assert problems(ranks) == problems(ranks) == problems(3 - ranks) == []
    flip(Path(f"{store}.bin"), 250)
    for resumed in (ranks, 3 - ranks):
        (said,) = problems(resumed)
        assert f"{store}.bin: bytes 200 to 299 are not those that this run read before" in said
        assert f"remove {tmp_path / 'run' / verification.FOLDER} to go on with these" in said
    assert problems(ranks, "another run") == []
    flip(Path(f"{store}.bin"), 250)
    record = tmp_path / "run" / verification.FOLDER / "rank-00000.jsonl"
    record.write_bytes(record.read_bytes()[:-9])  # a kill while it was written
    assert problems(1) == []
    flip(Path(f"{store}.bin"), 0)
    assert len(problems(1)) == 1


def test_a_record_that_cannot_be_written_does_not_end_a_training(store, tmp_path, capsys):
    (tmp_path / "run").write_text("a file in the place of the folder")
    assert begun(store, tmp_path / "run").problem is None
    assert (
        "cannot be written (Not a directory); a resumed run cannot compare all of its data" in capsys.readouterr().out
    )


@pytest.fixture
def watched(small_blocks, tmp_path, monkeypatch):
    """A Verification whose thread has compared all and looks often whether the file changed."""
    monkeypatch.setattr(verification, "LOOK_EVERY", 0.01)
    running = begun(small_blocks, tmp_path)
    running.go_on("Checkpoints after step 3 may have been trained on such bytes")
    yield running
    running.close()
    assert not running._thread.is_alive()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Write into the file, which keeps its size at every instant; its time changes even where clocks are coarse."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    later = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


def test_a_file_that_is_overwritten_under_a_running_training_is_noticed(watched, small_blocks):
    path = Path(f"{small_blocks}.bin")
    before = watched._status
    overwrite(path, 0, path.read_bytes())  # the same bytes once more are no fault
    wait_for(lambda: watched._status != before and watched.complete)
    assert watched.problem is None and watched.summary()[0].startswith("data: all of 610 bytes compared")
    overwrite(path, 333, b"\0\0")
    wait_for(lambda: watched.problem)
    assert "bytes 300 to 399 differ" in str(watched.problem) and "after step 3" in str(watched.problem)


def test_an_index_that_is_overwritten_under_a_running_training_is_noticed(watched, small_blocks):
    path, before = Path(f"{small_blocks}.idx"), watched._status
    content = path.read_bytes()
    overwrite(path, 0, content)
    wait_for(lambda: watched._status != before and watched.complete)
    assert watched.problem is None
    overwrite(path, len(content) - 1, bytes([content[-1] ^ 1]))  # the mode of the last sequence
    wait_for(lambda: watched.problem)
    assert f"{path}: was overwritten since it was opened, with other bytes" in str(watched.problem)


def test_a_file_that_becomes_shorter_under_a_running_training_is_noticed(watched, small_blocks):
    os.truncate(f"{small_blocks}.bin", 500)
    wait_for(lambda: watched.problem)
    assert f"{small_blocks}.bin: 500 bytes, 610 when it was opened" in str(watched.problem)


def test_a_file_that_is_replaced_by_another_of_its_name_is_not_what_the_run_reads(watched, small_blocks, tmp_path):
    expected = watched.stores[0].read(0, 305)
    (tmp_path / "other").write_bytes(bytes(610))
    os.replace(tmp_path / "other", f"{small_blocks}.bin")
    time.sleep(0.1)
    assert watched.problem is None and np.array_equal(watched.stores[0].read(0, 305), expected)


def test_the_thread_uses_its_share_of_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "DUTY", 0.05)
    monkeypatch.setattr(verification, "PIECE", 1 << 16)
    with IndexedWriter(tmp_path / "large", np.uint16) as writer:
        writer.add_document([np.zeros(16 << 20, np.uint16)], None)
    running = Verification([IndexedDataset(tmp_path / "large")], nothing_touched, tmp_path)
    began, busy = time.monotonic(), time.process_time()
    running.go_on("")
    time.sleep(0.6)
    running.close()
    elapsed = time.monotonic() - began
    assert running.verified > 3 << 16 and not running.complete
    assert running.processor_s < 1.5 * 0.05 * elapsed
    assert time.process_time() - busy < 3 * 0.05 * elapsed  # of the whole process: nothing runs uncounted
    (line,) = running.summary()
    assert line.startswith("data: ") and f"% of {32 << 20:,} bytes compared with their digests" in line
