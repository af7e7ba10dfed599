"""One launch at a time in a run folder: who is refused, who loses it, and that nothing of a run is touched before."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed import run_ranks
from kill_points import exit_code, kill_points

from megat2i import run_lock
from megat2i.checkpoint import finish, save
from megat2i.metrics import MetricsLog
from megat2i.run_lock import Owner
from megat2i.trainer import RunError


def nothing() -> None:
    """The check of a run folder in which all is well."""


@contextmanager
def holding(run_dir: Path, store: Path, ranks: int = 1):
    """Processes, one a rank, that hold the lock of ``run_dir``; killed at the end."""
    reader, writer = os.pipe()
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                # The store of a killed group is not the one of the next.
                group = dist.FileStore(str(store), ranks)
                dist.init_process_group("gloo", store=group, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
                run_lock.take(run_dir, nothing)
                os.write(writer, b"!")
                signal.pause()
            finally:
                os._exit(1)
    try:
        held = b""
        while len(held) < ranks:
            held += os.read(reader, 1)
        yield pids
    finally:
        for pid in pids:
            kill(pid)
        os.close(reader)
        os.close(writer)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return  # killed before


def attempt(run_dir: Path, check=nothing, release: bool = True) -> str:
    """What one rank is told that asks for the lock; "" where it gets it."""
    try:
        lock = run_lock.take(run_dir, check)
    except RunError as error:
        return str(error)
    if release:
        lock.release()
    return ""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_launch_is_refused_on_all_ranks_and_changes_nothing(tmp_path):
    run = tmp_path / "run"
    with holding(run, tmp_path / "store") as (pid,):
        before = contents(run)
        told = run_ranks(2, attempt, run)
        assert told[0] == told[1] and contents(run) == before
        owner = Owner.read(next((run / "lock").iterdir()))
        assert told[0].startswith(f"{run} is in use by another launch (process {pid} on {owner.host}, since 2")
        assert "stop it there, or choose another run.dir" in told[0]
        with pytest.raises(RunError, match=f"process {pid} on "):  # before the ranks of a launch have met
            run_lock.require_free(run)
    run_lock.require_free(run)


def test_a_killed_launch_loses_it_at_once_and_only_with_its_last_rank(tmp_path):
    run = tmp_path / "run"
    with holding(run, tmp_path / "store", ranks=2) as (first, second):
        kill(first)
        assert f"by process {first} on " in (told := run_ranks(1, attempt, run)[0])
        assert f"has ended, but its process {second} has not: nothing was changed" in told
        kill(second)
        started = time.monotonic()
        assert run_ranks(1, attempt, run) == [""]
        assert time.monotonic() - started < run_lock.LOOKS * run_lock.LOOK_EVERY_S / 2
    assert [path.name for path in (run / "lock").iterdir()] == ["000002.released"]


def test_what_the_check_finds_is_told_to_all_ranks_and_the_lock_is_given_back(tmp_path):
    def check() -> None:
        raise RunError("holds a run already")

    assert run_ranks(2, attempt, tmp_path / "run", check) == ["holds a run already"] * 2
    assert run_ranks(2, attempt, tmp_path / "run") == ["", ""]


def test_what_cannot_be_a_run_folder_is_one_sentence_on_all_ranks(tmp_path):
    (tmp_path / "run").touch()
    run_lock.require_free(tmp_path / "run")
    told = run_ranks(2, attempt, tmp_path / "run")
    assert told == [f"{tmp_path / 'run'} cannot be made or written (Not a directory): choose another run.dir"] * 2


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Function that gives the run folder ``tmp_path`` / "run" an owner that differs from this process in some fields.

    No process holds a lock on its file, as where the file system has none between machines.
    """
    monkeypatch.setattr(run_lock, "LOOKS", 4)
    monkeypatch.setattr(run_lock, "LOOK_EVERY_S", 0.05)

    def make(**changed) -> Path:
        path = tmp_path / "run" / "lock" / "000007.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(asdict(replace(Owner.here(), **changed))))
        return path

    return make


OTHER = {"host": "far", "machine": "another", "boot": "another", "since": "2026-01-02 03:04:05+00:00"}


@pytest.mark.parametrize("clock", ["goes", "is set back"])
def test_an_owner_on_another_machine_keeps_it_while_its_heartbeat_changes(elsewhere, clock):
    path, ended = elsewhere(**OTHER), threading.Event()

    def beat() -> None:
        at = time.time()
        while not ended.wait(0.02):
            at += 1 if clock == "goes" else -3600
            os.utime(path, (at, at))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        told = run_ranks(1, attempt, path.parents[1])[0]
    finally:
        ended.set()
        thread.join()
    assert "is in use by another launch (process" in told and "on far, since 2026-01-02 03:04:05+00:00)" in told
    assert [path.name for path in path.parent.iterdir()] == ["000007.json"]


@pytest.mark.parametrize("ahead", [0, 10**6])
def test_an_owner_on_another_machine_loses_it_without_a_heartbeat_whatever_its_clock_says(elsewhere, ahead):
    path = elsewhere(**OTHER)
    os.utime(path, (time.time() + ahead, time.time() + ahead))
    run_lock.require_free(path.parents[1])  # nobody can say so without looking for a while
    assert run_ranks(1, attempt, path.parents[1]) == [""]
    assert [path.name for path in path.parent.iterdir()] == ["000008.released"]


def test_a_machine_that_was_started_again_has_lost_it(elsewhere, monkeypatch):
    monkeypatch.setattr(run_lock, "LOOK_EVERY_S", 1000.0)
    path = elsewhere(machine=Owner.here().machine or "this", boot="the last one")
    if Owner.here().machine:
        assert run_ranks(1, attempt, path.parents[1]) == [""]
    else:  # what cannot be told from another machine of this name is none that was started again
        assert not run_lock._is_dead(path.parents[1], path)


def test_without_locks_of_the_file_system_the_process_decides_on_its_machine(elsewhere):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        born = run_lock.Process.of(process.pid)
        path = elsewhere(pid=born.pid, started=born.started)
        assert f"process {born.pid} on " in run_ranks(1, attempt, path.parents[1])[0]
        process.kill()
    assert run_ranks(1, attempt, path.parents[1]) == [""]


@pytest.mark.parametrize("content", ["", "[]", '{"host": "far"}', "\0" * 100])
def test_a_damaged_record_is_no_owner_for_ever(elsewhere, content):
    path = elsewhere()
    path.write_text(content)
    assert run_ranks(1, attempt, path.parents[1]) == [""]


def test_of_many_that_want_it_at_once_one_gets_it(tmp_path):
    """Ten processes, five rounds; each leaves without giving it back."""
    run = tmp_path / "run"
    for turn in range(1, 6):
        go = tmp_path / f"go{turn}"

        def contend(go=go, turn=turn) -> None:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            while not go.exists():
                time.sleep(0.001)
            told = attempt(run, release=False)
            (tmp_path / f"{turn}-{os.getpid()}").write_text(told)
            while len(list(tmp_path.glob(f"{turn}-*"))) < 10:  # the owner lives until all have asked
                time.sleep(0.001)

        children = [threading.Thread(target=exit_code, args=(contend,)) for _ in range(10)]
        for child in children:
            child.start()
        go.touch()
        for child in children:
            child.join()
        told = [path.read_text() for path in tmp_path.glob(f"{turn}-*")]
        assert sorted(map(bool, told)) == [False] + 9 * [True], told
        assert [path.name for path in (run / "lock").iterdir()] == [f"{turn:06d}.json"]


@pytest.mark.parametrize("loss", ["taken over", "removed"])
def test_a_launch_that_lost_its_folder_ends(tmp_path, monkeypatch, capfd, loss):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)

    def stand_still() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        run_lock.take(tmp_path / "run", nothing)
        path = tmp_path / "run" / "lock" / "000001.json"
        if loss == "removed":
            path.unlink()
        else:
            path.with_name("000002.json").touch()
        time.sleep(30)

    assert exit_code(stand_still) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: this launch has lost its run folder, since ") and said.count("\n") == 1
    assert ("another launch has taken it over" in said) == (loss == "taken over")


def test_a_kill_at_any_point_leaves_it_free(tmp_path):
    run = tmp_path / "run"

    def write() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        run_lock.take(run, nothing).release()

    points = 0
    for number in kill_points(run, nothing, write):
        points = number
        assert exit_code(write) == 0
        (left,) = (run / "lock").iterdir()
        assert left.suffix == ".released"
    assert points >= 8


class Empty:
    """An engine without any state."""

    updates = 1

    def fragments(self) -> list:
        return []


@pytest.mark.parametrize("writes", ["a line", "a checkpoint", "a checkpoint in the background"])
def test_an_older_incarnation_on_a_lost_node_writes_nothing_more(tmp_path, monkeypatch, capfd, writes):
    """Two processes. What the first one does to its lock does not reach the folder, as from a node without a network.

    Its heartbeat would tell it later, if at all: here it never beats.
    """
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 1000.0)
    run, lost, taken = tmp_path / "run", tmp_path / "lost", tmp_path / "taken"
    monkeypatch.setattr(run_lock, "LOOKS", 2)
    monkeypatch.setattr(run_lock, "LOOK_EVERY_S", 0.05)
    record, checkpoint = run / "metrics.jsonl", run / "checkpoints" / "step-1"

    def older() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        lock = run_lock.take(run, nothing)
        log = MetricsLog(run, 0, lock.require)
        log.write({"step": 1})
        lost.touch()
        while not taken.exists():
            time.sleep(0.01)
        if writes == "a line":
            log.write({"step": 2})
        else:
            save(run / "checkpoints", 1, Empty(), "1.1.1", 1, "background" in writes, fence=lock.require)
            finish()

    def younger() -> None:
        while not lost.exists():
            time.sleep(0.01)
        path = run / "lock" / "000001.json"
        content = json.loads(path.read_text()) | OTHER
        path.unlink()  # the first one's lock and heartbeat are on a file that nobody sees any more
        path.write_text(json.dumps(content))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        lock = run_lock.take(run, nothing)
        lock.require()
        taken.touch()
        while not over.is_set():
            time.sleep(0.01)

    over = multiprocessing.get_context("fork").Event()
    second = multiprocessing.get_context("fork").Process(target=younger)
    second.start()
    try:
        assert exit_code(older) == 1
        assert second.is_alive()
    finally:
        over.set()
        second.join(30)
    assert second.exitcode == 0
    said = capfd.readouterr().err.splitlines()
    ends = "since another launch has taken it over: it ends here, nothing else is written"
    assert [line for line in said if line.startswith("error: ")] == [
        f"error: this launch has lost its run folder, {ends}"
    ]
    assert record.read_text() == '{"step": 1}\n' and not checkpoint.exists()


def test_asking_for_the_lock_does_not_give_it_back(tmp_path):
    """A process loses its locks on a file when it closes any descriptor of it."""

    def ask() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        lock = run_lock.take(tmp_path / "run", nothing)
        lock.require()
        assert exit_code(lambda: os._exit(bool(run_lock._holder(lock._path)))) == 1

    assert exit_code(ask) == 0
