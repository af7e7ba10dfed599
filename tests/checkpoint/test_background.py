"""Saving in the background: the same files, a bounded stall, failures told to all ranks, and kills at any moment."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed import run_ranks
from numbered_engine import flat_engine, newest, rewrite_manifest, save_steps

from megat2i import checkpoint, files
from megat2i.checkpoint import CheckpointError, saving
from megat2i.checkpoint import folder as checkpoint_folder


def slow_writing(monkeypatch, seconds: float, rank: int = 0) -> None:
    """A slow disk under one rank."""
    write_rank = saving.write_rank

    def slowly(*arguments):
        time.sleep(seconds if dist.get_rank() == rank else 0)
        write_rank(*arguments)

    monkeypatch.setattr(saving, "write_rank", slowly)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_files_are_those_of_a_save_at_once(tmp_path, ranks):
    def run():
        for background in (False, True):
            save_steps(tmp_path / str(background), 2, 4, 6, keep=2, background=background)
        checkpoint.finish()
        assert newest(tmp_path / "True") == (6, [])

    run_ranks(ranks, run)
    at_once, behind = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))}
        for name in ("False", "True")
    )
    assert at_once == behind and len(behind) == 2 * (ranks + 1)


def test_training_goes_on_while_the_copy_is_written(tmp_path, monkeypatch):
    def run():
        slow_writing(monkeypatch, 0.6)
        engine = flat_engine()
        engine.step(1)
        first = checkpoint.save(tmp_path, 1, engine, "1.1.1", 9, background=True)
        assert first.stall_s < 0.3 and first.waited_s < 0.1 and not first.path.exists()
        engine.step(2)  # overwrites the state while step 1 is still being written
        second = checkpoint.save(tmp_path, 2, engine, "1.1.1", 9, background=True)
        assert first.path.exists(), "two saves are under way"
        assert 0.3 < second.waited_s < second.stall_s
        for part in engine.fragments():
            part.values.fill_(-1)
        checkpoint.finish()
        for step in (1, 2):
            checkpoint.load_engine(checkpoint.open_checkpoint(tmp_path / f"step-{step}"), flat_engine())
        third = checkpoint.save(tmp_path, 3, engine, "1.1.1", 9)
        assert third.path.exists() and third.stall_s > 0.5, "a save at once waits for its own end"

    run_ranks(2, run)


def test_the_memory_of_the_copy_is_used_again_and_follows_the_engine(tmp_path):
    def addresses() -> list[int]:
        return [memory.data_ptr() for memory in saving._BACKGROUND._memory.values()]

    def run():
        save_steps(tmp_path, 1, background=True)
        before = addresses()
        save_steps(tmp_path, 2, background=True)
        assert addresses() == before and len(before) == 3
        engine = flat_engine(500)
        engine.step(3)
        checkpoint.save(tmp_path, 3, engine, "1.1.1", 9, background=True)
        checkpoint.finish()
        checkpoint.load_engine(checkpoint.open_checkpoint(tmp_path / "step-3"), flat_engine(500))

    run_ranks(1, run)


@pytest.mark.parametrize("told_by", ["save", "finish"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_is_told_to_all_at_the_next_call(tmp_path, failing, told_by):
    """A file size limit stops the write as a full disk does: in the middle of the file, by the kernel."""

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save_steps(tmp_path, 2)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        save_steps(tmp_path, 4, background=True)
        message = "cannot write .*step-4.writing: " + ("" if dist.get_rank() == failing else "another rank")
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=message):
            save_steps(tmp_path, 6, background=True) if told_by == "save" else checkpoint.finish()
        assert time.monotonic() - started < 5
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        dist.barrier()
        assert newest(tmp_path) == (2, [])
        checkpoint.finish()  # told once
        dist.barrier()
        save_steps(tmp_path, 8, background=True)
        checkpoint.finish()
        assert newest(tmp_path) == (8, [])

    run_ranks(2, run)


def test_a_commit_that_fails_is_told_to_all(tmp_path):
    def run():
        save_steps(tmp_path, 2)
        if dist.get_rank() == 0:
            (tmp_path / "step-4").write_text("in the way")
        save_steps(tmp_path, 4, background=True)
        with pytest.raises(
            CheckpointError, match="cannot commit .*step-4: " + ("" if dist.get_rank() == 0 else "another rank")
        ):
            checkpoint.finish()

    run_ranks(2, run)


def test_a_rank_whose_folder_is_slow_to_sync_has_not_listed_its_part_yet(tmp_path, monkeypatch):
    """The first rank renames the folder as soon as all listings are there: nothing may use its old name after that."""
    sync = files.fsync_folder

    def slow(folder: Path) -> None:
        if dist.get_rank() == 1:
            time.sleep(0.3)
        sync(folder)

    def run():
        for module in (files, checkpoint_folder):
            monkeypatch.setattr(module, "fsync_folder", slow)
        save_steps(tmp_path, 2, background=True)
        checkpoint.finish()
        assert newest(tmp_path) == (2, [])

    run_ranks(2, run)


def test_the_death_of_a_rank_ends_the_wait_for_its_part(tmp_path, monkeypatch):
    noted = tmp_path / "noted"

    def run():
        slow_writing(monkeypatch, 60, rank=1)
        save_steps(tmp_path / "checkpoints", 2, background=True)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            checkpoint.finish()
        noted.write_text(str(time.monotonic() - started))

    with pytest.raises(AssertionError, match="rank 1: died with exit code -9$"):
        run_ranks(2, run, timeout=30)
    assert float(noted.read_text()) < 5
    assert checkpoint.committed(tmp_path / "checkpoints") == []


def test_a_process_that_ends_without_finish_does_not_wait(tmp_path, monkeypatch):
    def run():
        slow_writing(monkeypatch, 60, rank=1)
        save_steps(tmp_path, 2, background=True)

    started = time.monotonic()
    run_ranks(2, run)
    assert time.monotonic() - started < 10
    assert checkpoint.committed(tmp_path) == []


def saver(rank: int, store: Path, folder: Path, first: int, acknowledged: Path) -> None:
    """Saves in the background until it is killed, and writes down each step when it is safe."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    engine = flat_engine(30_000)
    for step in range(first, first + 1000):
        engine.step(step)
        checkpoint.save(folder, step, engine, "1.1.2", keep=2, background=True)
        if step > first:
            Path(f"{acknowledged}.{rank}").write_text(f"{step - 1}.")


def acknowledged_step(acknowledged: Path) -> int:
    """The newest step that one of the savers knew to be safe."""
    texts = [file.read_text() for file in acknowledged.parent.glob(f"{acknowledged.name}.*")]
    return max((int(text[:-1]) for text in texts if text.endswith(".")), default=0)


def kill_a_pair(generator: random.Random, store: Path, folder: Path, first: int, acknowledged: Path) -> None:
    """Start two savers and kill them in the midst of a save, some saves later: at once, or one of them first."""
    arguments = (store, folder, first, acknowledged)
    processes = [multiprocessing.get_context("fork").Process(target=saver, args=(r, *arguments)) for r in (0, 1)]
    for process in processes:
        process.start()
    kill_at, deadline = generator.choice([0, first + 1, first + 2, first + 4]), time.monotonic() + 30
    while acknowledged_step(acknowledged) < kill_at and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(generator.uniform(0.0, 0.05))
    generator.shuffle(processes)
    assert all(process.is_alive() for process in processes), "a saver ended by itself"
    processes[0].kill()
    time.sleep(generator.choice([0, 0, 0.01, 0.1]))  # then the other one goes on, and notices
    processes[1].kill()
    for process in processes:
        process.join()


@pytest.mark.parametrize("kills", [15, pytest.param(300, marks=pytest.mark.full)])
def test_kills_never_cost_an_acknowledged_step_nor_mix_two(tmp_path, kills):
    generator, folder, newest_step, saves = random.Random(2), tmp_path / "checkpoints", 0, 0

    def check(promised):
        lines = []
        found = checkpoint.latest(folder, lines.append)
        assert lines == [] and (found.step if found else 0) >= promised, (found, promised, lines)
        for path in checkpoint.committed(folder)[:2]:  # a third one is on its way out
            checkpoint.load_engine(checkpoint.open_checkpoint(path), flat_engine(30_000))
        return found.step if found else 0

    for trial in range(kills):
        acknowledged = tmp_path / f"acknowledged-{trial}"
        kill_a_pair(generator, tmp_path / f"store-{trial}", folder, newest_step + 1, acknowledged)
        promised = max(newest_step, acknowledged_step(acknowledged))
        newest_step, before = run_ranks(2, check, promised)[0], newest_step
        saves += newest_step - before
    assert saves > 2 * kills, "too few saves between the kills to mean anything"


def test_the_check_after_a_kill_notices_two_steps_mixed(tmp_path):
    """Its negative control: a file of another step in the folder, with a manifest that vouches for it."""

    def run():
        save_steps(tmp_path, 2, 4)
        manifests = [checkpoint.open_checkpoint(tmp_path / f"step-{step}").manifest for step in (2, 4)]
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copy(tmp_path / "step-2" / "rank-00001.safetensors", tmp_path / "step-4")
            parts = [
                next(old for old in manifests[0]["parts"] if (old["file"], old["key"]) == (part["file"], part["key"]))
                if part["file"].startswith("rank-00001")
                else part
                for part in manifests[1]["parts"]
            ]
            rewrite_manifest(tmp_path / "step-4" / "manifest.json", parts=parts)
        dist.barrier()
        found = checkpoint.latest(tmp_path, pytest.fail)
        with pytest.raises(AssertionError, match="is wrong") if dist.get_rank() == 1 else nullcontext():
            checkpoint.load_engine(found, flat_engine())

    run_ranks(2, run)
