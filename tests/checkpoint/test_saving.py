"""Saving: full disks and kills never cost an acknowledged checkpoint, and retention keeps the right ones."""

import errno
import os
import random
import signal
import subprocess
import time
from contextlib import suppress

import pytest
import torch.distributed as dist
from distributed import run_ranks
from numbered_engine import flat_engine, newest, save_steps
from safetensors import SafetensorError

from megat2i import checkpoint
from megat2i.checkpoint import CheckpointError, saving
from megat2i.checkpoint import folder as contents


@pytest.mark.parametrize(
    ("function", "failing"),  # only the first rank makes the folder
    [("_prepare", 0), *((function, rank) for function in ("save_file", "_write_listing", "fsync") for rank in (0, 1))],
)
def test_a_rank_that_cannot_write_fails_all_and_loses_nothing(tmp_path, monkeypatch, function, failing):
    """A full disk, as the writer sees it."""

    def run():
        save_steps(tmp_path, 2)
        before = {path: path.read_bytes() for path in (tmp_path / "step-2").iterdir()}

        def full(*_):
            if function == "save_file":
                raise SafetensorError("I/O error: No space left on device")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            if dist.get_rank() == failing:
                patch.setattr(
                    os if function == "fsync" else saving if function == "_prepare" else contents, function, full
                )
            with pytest.raises(
                CheckpointError, match="No space left" if dist.get_rank() == failing else "another rank"
            ):
                save_steps(tmp_path, 4)
        dist.barrier()
        assert {path: path.read_bytes() for path in before} == before
        assert newest(tmp_path)[0] == 2
        dist.barrier()
        save_steps(tmp_path, 4)  # the disk has room again
        assert newest(tmp_path) == (4, [])

    run_ranks(2, run, timeout=60)


def test_a_disk_without_room_is_said_before_a_byte_is_written(tmp_path):
    """On a real file system of 1 MB; the state of all ranks counts."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no right to mount a small disk")

    def fill() -> None:
        with suppress(OSError), open(folder / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(b"0" * 4096)

    def run() -> str:
        save_steps(folder, 2)
        if dist.get_rank() == 0:
            fill()
        dist.barrier()
        with pytest.raises(CheckpointError) as raised:
            save_steps(folder, 4)
        dist.barrier()
        assert list((folder / "step-4.writing").iterdir()) == [] and newest(folder)[0] == 2
        dist.barrier()
        (folder / "ballast").unlink(missing_ok=True)
        dist.barrier()
        save_steps(folder, 4)
        assert newest(folder) == (4, [])
        return str(raised.value)

    try:
        said = run_ranks(2, run, timeout=60)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    needs = f"{folder / 'step-4'} needs 3.6 kB, and its file system has 0 bytes free (1 checkpoint there, "
    assert said[0] == said[1] and said[0].startswith(needs) and "training.keep_checkpoints" in said[0]


def test_a_really_full_disk(tmp_path):
    """A file size limit stops the write as a full disk does: in the middle of the file, by the kernel."""

    def run():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save_steps(tmp_path, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match="step-4.writing"):
            save_steps(tmp_path, 4)
        assert newest(tmp_path)[0] == 2

    run_ranks(1, run)


def test_kills_while_saving_never_cost_an_acknowledged_checkpoint(tmp_path):
    acknowledged, generator = tmp_path / "acknowledged", random.Random(1)
    folder, kills, step = tmp_path / "checkpoints", 0, 0

    def saver(first):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        engine = flat_engine(30_000)
        for number in range(first, first + 1000):
            engine.step(number)
            checkpoint.save(folder, number, engine, "1.1.1", keep=2)
            with open(acknowledged, "w") as file:
                file.write(f"{number}.")

    def acknowledged_step():
        text = acknowledged.read_text() if acknowledged.exists() else ""
        return int(text[:-1]) if text.endswith(".") else 0

    def check(promised):
        lines = []
        found = checkpoint.latest(folder, lines.append)
        assert found is not None and found.step >= promised and lines == []
        for path in checkpoint.committed(folder)[:2]:  # a third one is on its way out
            checkpoint.verify(checkpoint.open_checkpoint(path))
        return found.step

    while kills < 30:
        process = os.fork()
        if process == 0:
            try:
                saver(step + 1)
            finally:
                os._exit(1)
        kill_at = step + generator.choice([0, 1, 2, 4])  # a save under way, however slow the machine is
        deadline = time.monotonic() + 20
        while acknowledged_step() < kill_at and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.02))
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL, "the saver ended by itself"
        kills += 1
        promised = max(step, acknowledged_step())
        if promised:
            step = run_ranks(1, check, promised)[0]
    assert step > 30, "too few saves between the kills to mean anything"


@pytest.mark.parametrize("keep", [1, 3])
def test_retention_keeps_the_newest(tmp_path, keep):
    def run():
        save_steps(tmp_path, 2, 9, 10, 100, 101, keep=keep)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {f"step-{step}" for step in (10, 100, 101)[3 - keep :]}

    run_ranks(1, run)


def test_retention_never_drops_what_was_just_written_for_a_damaged_one(tmp_path):
    """After a newer checkpoint turned out damaged and the run went on from an older one."""

    def run():
        save_steps(tmp_path, 4, 8)
        (tmp_path / "step-8" / "manifest.json").unlink()
        assert newest(tmp_path)[0] == 4
        save_steps(tmp_path, 5, keep=1)
        assert newest(tmp_path)[0] == 5

    run_ranks(1, run)
