"""Which processes a launch stands or falls with, on trees of real processes that bear the launchers' names."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megat2i.processes import Process

STARTER = "import subprocess, sys, time; time.sleep({}); sys.exit(subprocess.call(sys.argv[1:]))"
RANK = """
import json, os
from megat2i.processes import launchers_above
chain = launchers_above()
print(json.dumps(chain and [process.command[:3] for process in chain]), flush=True)
"""


@pytest.fixture
def start(tmp_path, repository):
    """Function of (command) that starts it in a session of its own; ``launch`` starts the rank after ``delay``."""
    (tmp_path / "deepspeed").mkdir()
    package = tmp_path / "modules" / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (tmp_path / "deepspeed" / "deepspeed").write_text(STARTER.format(0))
    (tmp_path / "rank.py").write_text(RANK)

    def run(*above: str, delay: float = 0.0) -> subprocess.Popen:
        (package / "launch.py").write_text(STARTER.format(delay))
        rank = (sys.executable, str(tmp_path / "rank.py"))
        command = (*above, sys.executable, "-m", "deepspeed.launcher.launch", *rank)
        path = f"{tmp_path / 'modules'}{os.pathsep}{repository}"
        environment = os.environ | {"LOCAL_SIZE": "2", "PYTHONPATH": path}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

    run.runner = (sys.executable, str(tmp_path / "deepspeed" / "deepspeed"))
    return run


def names(process: subprocess.Popen) -> list[str] | None:
    """What the rank says, by the last word that tells a process from others."""
    with process:
        chain = json.loads(process.stdout.read())
    return chain and [command[2] if command[1] == "-m" else Path(command[1]).name for command in chain]


def test_deepspeeds_two_launchers_are_watched(start):
    assert names(start(*start.runner)) == ["deepspeed.launcher.launch", "deepspeed"]


def test_on_another_machine_the_remote_shell_is_watched_too(start, tmp_path):
    shell = "import os, subprocess, sys; subprocess.call(sys.argv[1:], start_new_session=True)"
    with_name = f"exec -a 'sshd: user@notty' {sys.executable} -c '{shell}' \"$@\""
    process = start("bash", "-c", with_name, "bash")
    with process:
        chain = json.loads(process.stdout.read())
    assert [command[0] for command in chain] == [sys.executable, "sshd: user@notty"]


@pytest.mark.parametrize("task", (True, False))
def test_the_daemon_of_a_slurm_step_is_watched(start, tmp_path, task):
    """Without the variable of a task it is some other process's business."""
    shell = "import subprocess, sys; subprocess.call(sys.argv[1:])"
    command = f"exec -a 'slurmstepd: [7.0]' {sys.executable} -c '{shell}' {sys.executable} {tmp_path / 'rank.py'}"
    environment = os.environ | ({"SLURM_PROCID": "1"} if task else {})
    for name in ("LOCAL_SIZE", "TORCHELASTIC_RUN_ID", *(() if task else ("SLURM_PROCID",))):
        environment.pop(name, None)
    chain = json.loads(subprocess.check_output(["bash", "-c", command], env=environment))
    assert [above[0] for above in chain] == (["slurmstepd: [7.0]"] if task else [])


def test_a_launcher_that_ended_before_its_ranks_began_is_noticed(start):
    process = start(*start.runner, delay=1.0)
    time.sleep(0.5)
    process.kill()
    assert names(process) is None


def test_a_process_is_its_number_and_its_start():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        child = Process.of(process.pid)
        assert child.alive and child.parent == Process.of(os.getpid())
        assert not Process(process.pid, child.started + 1).alive
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for it
        assert not child.alive and Process.of(process.pid) is None
