"""The watchdog names the rank that stands still and ends the job, and leaves alone what only takes long."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from megat2i.pretrain import pretrain as pretrain_here
from megat2i.watchdog import EXIT_CODE, PHASES, Answer, Settings, main_stack, report

LIMIT = 2.0
# A rank without a model: it marks what a training marks, and waits for its peers by files.
RANK = """
import os, sys, time
from pathlib import Path
from megat2i.launch import Launch
from megat2i.progress_marks import beat, mark, start_watchdog

rank, folder, fault = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def wait_for_peers(step):
    (folder / f"step-{step}-rank-{rank}").touch()
    while not (folder / f"step-{step}-rank-{1 - rank}").exists():
        time.sleep(0.01)

def read_rows():
    open(folder / "fifo").read()  # nobody writes

def draw():
    for _ in range(75):
        time.sleep(0.1)
        beat()

wait_for_peers(0)  # on a busy machine one may be up much later than the other
start_watchdog(folder / "run", float(sys.argv[4]), Launch("torchrun", rank, rank, 2, "test"))
for step in range(1, 100000 if fault == "none" else 8):
    mark("reading data", step)
    if step == 5 and rank == 1 and fault == "fifo":
        read_rows()
    mark("forward and backward")
    wait_for_peers(step)
    if step == 5 and rank == 0 and fault == "slow":
        draw()
(folder / f"end-{rank}").touch()
"""


class Ranks:
    """Two processes of RANK; their standard error is in one file."""

    def __init__(self, folder: Path, fault: str, limit: float):
        self.folder = folder
        os.mkfifo(folder / "fifo")
        self.log = open(folder / "log", "w+")  # noqa: SIM115 (closed by end)
        self.processes = [self._start(rank, fault, limit) for rank in range(2)]

    def _start(self, rank: int, fault: str, limit: float) -> subprocess.Popen:
        command = [sys.executable, "-c", RANK, str(rank), str(self.folder), fault, str(limit)]
        return subprocess.Popen(command, stderr=self.log, start_new_session=True)

    def reach(self, step: int) -> None:
        wait_for(lambda: all((self.folder / f"step-{step}-rank-{rank}").exists() for rank in range(2)))

    def verdict(self, seconds: float) -> str:
        """What is said within ``seconds``."""
        wait_for(lambda: "stacks of all ranks are in" in self.said(), seconds)
        return self.said()

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def codes(self, seconds: float = 30.0) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def watchdogs(self) -> dict[int, int]:
        """Process id of the watchdog of each rank that has one."""
        pids = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                described = path.read_bytes().decode().rstrip("\0").rpartition("\0")[2]
                if described.startswith("{") and f"{self.folder}/" in described:
                    pids[json.loads(described)["rank"]] = int(path.parent.name)
        return pids

    def end(self) -> None:
        pids = [process.pid for process in self.processes if process.poll() is None] + [*self.watchdogs().values()]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.log.close()


@pytest.fixture
def ranks(tmp_path):
    """Function of (fault, limit) -> Ranks; nothing of them is left behind."""
    started = []

    def start(fault: str = "none", limit: float = LIMIT) -> Ranks:
        started.append(Ranks(tmp_path, fault, limit))
        return started[-1]

    yield start
    for group in started:
        group.end()


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.02)


def test_a_stopped_rank_is_named_within_twice_the_limit(ranks):
    group = ranks()
    group.reach(20)
    group.processes[1].send_signal(signal.SIGSTOP)
    said = group.verdict(2 * LIMIT)
    host, pid = os.uname().nodename, group.processes[1].pid
    assert f"watchdog: rank 1 on {host} stands still, step " in said
    assert "forward and backward: stopped by a signal. No rank made progress for 2 s" in said
    assert f"rank 1, process {pid} on {host}, step " in said and 'File "<string>", line ' in said
    assert "rank 0: step " in said and "in wait_for_peers\n" in said
    assert group.codes() == [EXIT_CODE] * 2
    assert "Traceback" not in said
    records = sorted((group.folder / "run" / "hang").glob("*/rank-*.json"))
    assert [json.loads(record.read_text())["state"] for record in records][1] == "T"


def test_a_rank_that_waits_for_its_data_is_named(ranks):
    said = ranks("fifo").verdict(60)
    assert "rank 1 on " in said and "stands still, step 5, reading data: at <string>:" in said
    assert "in read_rows" in said and "rank 0: step 5, forward and backward" in said


def test_a_rank_that_died_is_named_where_the_others_hang(ranks):
    group = ranks()
    group.reach(5)
    group.processes[1].kill()
    said = group.verdict(2 * LIMIT)
    assert "watchdog: rank 1 does not answer: it has ended" in said
    assert group.codes() == [EXIT_CODE, -signal.SIGKILL]


def test_what_only_takes_long_goes_on(ranks):
    """One rank works for two and a half times the limit and says so; the other waits for it without a sign."""
    group = ranks("slow", limit=3.0)
    assert group.codes() == [0, 0] and group.said() == ""
    wait_for(lambda: group.watchdogs() == {}, 5)
    assert not (group.folder / "run" / "hang").exists()


def test_a_job_that_is_stopped_and_continued_goes_on(ranks):
    group = ranks()
    group.reach(5)
    pids = [*group.watchdogs().values(), *(process.pid for process in group.processes)]
    assert len(pids) == 4
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(2 * LIMIT if number == signal.SIGSTOP else LIMIT)
    assert [process.poll() for process in group.processes] == [None, None] and group.said() == ""


def test_training_survives_its_watchdogs_and_they_do_not_survive_it(ranks):
    group = ranks()
    group.reach(5)
    watchdogs = group.watchdogs()
    assert sorted(watchdogs) == [0, 1]
    # What launchers, terminals and SLURM send to all processes.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(watchdogs[1], number)
    os.kill(watchdogs[0], signal.SIGKILL)
    time.sleep(LIMIT)
    assert [process.poll() for process in group.processes] == [None, None]
    assert group.watchdogs() == {1: watchdogs[1]}
    group.processes[1].kill()
    wait_for(lambda: group.watchdogs() == {}, 2)
    assert group.said() == ""


def test_a_run_folder_that_does_not_answer_keeps_no_rank_from_being_named(ranks, tmp_path):
    for rank in range(2):  # neither written nor read
        (tmp_path / "run" / "hang" / "None-None" / f"rank-{rank:05d}.json").mkdir(parents=True)
    group = ranks("fifo", limit=1.0)
    assert group.codes() == [EXIT_CODE] * 2
    said = group.said()
    assert "does not answer, so nothing is known of the other ranks" in said
    assert "watchdog: rank 1 on " in said and "step 5, reading data: at <string>:" in said


def answer(rank: int, step: int = 3, phase: str = "forward and backward", **changes) -> Answer:
    values = {"host": "a", "pid": 7, "stalled": True, "ticking": True, "state": "S", "stack": []}
    return Answer(rank=rank, step=step, phase=phase, **values | changes)


IN_COLLECTIVE = ['  File "/x/torch/distributed/c10d.py", line 1 in all_reduce', '  File "/x/megat2i/t.py", line 2 in f']


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ([answer(0), answer(1, ticking=False)], "rank 1 on a stands still, step 3, forward and backward: its Python"),
        ([answer(0), answer(1, state="D", host="b")], "rank 1 on b stands still, step 3, forward and backward: its pr"),
        ([answer(0, 4), answer(1, 4), answer(2, 3)], "rank 2 on a stands still, step 3"),
        ([answer(0, stack=IN_COLLECTIVE), answer(1)], "rank 1 on a stands still"),
        ([answer(0), answer(1)], "all 2 ranks stand still, and none stands out"),
        ([answer(0), answer(1), answer(3)], "rank 2 does not answer: it has ended"),
        ([answer(0, 0, PHASES[1]), answer(3, 0, PHASES[1])], "ranks 1-2 do not answer: they never started"),
        ([answer(n, state="T", host=f"h{n % 2}") for n in (0, 1, 2, 4)] + [answer(3)], "ranks 0-2, 4 on h0, h1 stand"),
    ],
)
def test_the_one_at_fault_is_named(answers, sentence):
    size = max(answer.rank for answer in answers) + 1
    lines = report(answers, Settings(0, 0, size, 1, 1, 300.0, "folder", 0, 0, 0, None))
    assert lines[0].startswith(f"watchdog: {sentence}") and "No rank made progress for 300 s" in lines[0]


def test_others_are_said_to_be_where_they_wait_together():
    answers = [answer(rank, stack=IN_COLLECTIVE) for rank in range(5)] + [answer(5, state="T")]
    lines = report(answers, Settings(0, 0, 6, 1, 1, 300.0, "folder", 0, 0, 0, None))
    assert "ranks 0-4: step 3, forward and backward, at t.py:2 in f" in lines


def test_the_stack_is_the_main_threads():
    text = 'Thread 0x00aa (most recent call first):\n  File "a", line 1 in f\n\n'
    text += 'Current thread 0x00bb (most recent call first):\n  File "b", line 2 in g\n  File "b", line 3 in h\n'
    assert main_stack(text, 0xBB) == ['  File "b", line 2 in g', '  File "b", line 3 in h']
    assert main_stack(text, 0xAA) == ['  File "a", line 1 in f'] and main_stack(text, 0xCC) == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [LIMIT, 0.0], ids=["watched", "not watched"])
def test_a_training_whose_data_hangs_is_named(run_config, providers, tmp_path, limit):
    """A real training of two forked ranks, one of which gets no batch of its third step."""
    import torch._dynamo  # noqa: F401 (slow; here once instead of in every rank)

    settings = run_config(tmp_path / "run")
    settings = replace(settings, runtime=replace(settings.runtime, watchdog_s=limit, self_test=False))
    os.mkfifo(tmp_path / "fifo")
    port = free_port()

    def blocked_data(config, backend, groups):
        data = providers[1](config, backend, groups)

        def micro_batches(step):
            if step == 2 and backend.rank == 1:
                open(tmp_path / "fifo").close()  # nobody writes
            return data.micro_batches(step)

        return replace(data, micro_batches=micro_batches)

    def rank(number: int) -> None:
        os.dup2(os.open(tmp_path / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            pretrain_here(settings, False, (providers[0], blocked_data, providers[2]))
        except BaseException as error:  # as the interpreter does outside of multiprocessing
            sys.excepthook(type(error), error, error.__traceback__)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank, args=(number,)) for number in range(2)]
    try:
        for process in processes:
            process.start()
        log = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: log.exists() and '"step": 2,' in log.read_text())
        processes[1].join(4 * LIMIT)
        if limit:
            processes[0].join(4 * LIMIT)
            said = (tmp_path / "log").read_text()
            assert [process.exitcode for process in processes] == [EXIT_CODE] * 2
            assert "stands still, step 3, reading data: at " in said and "in micro_batches" in said
            assert "rank 0: step 3, forward and backward, at trainer.py:" in said
        else:
            assert [process.exitcode for process in processes] == [None, None], "the control has nothing to show"
            assert "stands still" not in (tmp_path / "log").read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.full
def test_the_last_line_under_deepspeeds_launcher_names_the_rank(pretrain, tmp_path):
    launcher = ("deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()))
    process = pretrain(
        tmp_path / "run",
        "training.steps=100000",
        "runtime.watchdog_s=2",
        "runtime.self_test=false",
        "optimizer.engine=torch",
        launcher=launcher,
    )
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: log.exists() and '"step": 5,' in log.read_text(), 120)
        os.kill(rank_one(process.pid), signal.SIGSTOP)
        output, errors = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == EXIT_CODE
    assert errors.splitlines()[-1].startswith("watchdog: rank 1 on ") and "Traceback" not in output + errors


def rank_one(session: int) -> int:
    """Process id of rank 1 among the processes of a session."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            pid = int(path.parent.name)
            name = (path.parent / "cmdline").read_bytes()
            if os.getsid(pid) == session and b"pretrain_t2i.py" in name and b"\0RANK=1\0" in path.read_bytes():
                return pid
    raise AssertionError("no process of rank 1")
