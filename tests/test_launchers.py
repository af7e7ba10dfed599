"""Real launchers that are killed: their ranks end, the run folder is free at once, and it is not before."""

import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from launched import free_port, wait_for_step

from megat2i import run_lock
from megat2i.processes import Process, launchers_above
from megat2i.trainer import RunError

pytestmark = pytest.mark.slow

LIMIT_S = 10.0  # within which no process may be left
LONG = ("training.steps=100000", "training.checkpoint_every=2", "runtime.self_test=false")


@pytest.fixture
def launch(pretrain, tmp_path):
    """Function of (launcher's name, further arguments) that starts two ranks; nothing outlives the test."""
    processes = []

    def start(name: str, *arguments: str):
        port = str(free_port())
        launcher = {
            "deepspeed": ("deepspeed", "--quiet", "--num_accelerators", "2", "--master_port", port),
            "torchrun": ("torchrun", "--nproc_per_node", "2", "--master_port", port),
            "python": (sys.executable,),
        }[name]
        processes.append(pretrain(tmp_path / "run", *LONG, *arguments, launcher=launcher))
        return processes[-1]

    yield start
    for process in processes:
        for one in [process.pid, *session(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.communicate()


def session(leader: int) -> list[int]:
    """The living processes that ``leader`` started, in its own session or in one that torchrun made for a rank."""
    living = [Process.of(int(path.name)) for path in Path("/proc").glob("[0-9]*")]
    living = [process for process in living if process is not None]
    known = {leader}
    for process in living:
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == leader:
                known.add(process.pid)
    grown = True
    while grown:
        more = {process.pid for process in living if process.parent and process.parent.pid in known} - known
        known |= more
        grown = bool(more)
    return sorted(known - {leader})


def seconds_until_gone(pids: list[int]) -> float:
    """How long until none of ``pids`` is alive."""
    processes = [process for pid in pids if (process := Process.of(pid))]
    started = time.monotonic()
    while any(process.alive for process in processes) and time.monotonic() < started + 3 * LIMIT_S:
        time.sleep(0.02)
    return time.monotonic() - started


def kill_the_launcher(launch, name: str, number: int, run: Path) -> str:
    """Signal the launcher alone in the middle of a training; what the ranks say."""
    process = launch(name)
    wait_for_step(run, 3, process)
    others = session(process.pid)
    assert len(others) >= 2
    os.kill(process.pid, number)
    seconds = seconds_until_gone([process.pid, *others])
    output, errors = process.communicate(timeout=60)
    assert seconds < LIMIT_S, errors
    return output + errors


def test_the_ranks_end_with_a_killed_launcher_and_the_run_goes_on_at_once(launch, tmp_path):
    run = tmp_path / "run"
    said = kill_the_launcher(launch, "deepspeed", signal.SIGKILL, run)
    sentence = r"^the launcher has ended; stopped after step [\d,]+; the last checkpoint is step [\d,]+; --resume .*$"
    assert len(re.findall(sentence, said, re.M)) == 1 and "Traceback" not in said
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = max(json.loads(line)["step"] for line in lines if line.endswith("\n"))
    process = launch("python", "--resume")
    wait_for_step(run, last + 3, process)  # it was not kept waiting by a dead owner
    with pytest.raises(RunError, match=f"{run} is in use by another launch .process {process.pid} on "):
        run_lock.require_free(run)
    assert process.poll() is None


OTHERS = [("deepspeed", number) for number in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")]
OTHERS += [("torchrun", number) for number in ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")]


@pytest.mark.full
@pytest.mark.parametrize(("name", "number"), OTHERS)
def test_whatever_ends_a_launcher_ends_its_ranks(launch, tmp_path, name, number):
    kill_the_launcher(launch, name, getattr(signal, number), tmp_path / "run")


def test_a_process_without_a_launcher_survives_its_shell(monkeypatch):
    for name in ("LOCAL_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert launchers_above() == []
