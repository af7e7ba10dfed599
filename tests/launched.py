"""Trainings that were launched: what their launchers set, a port for them, and waiting for them."""

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

# What srun -N2 -n4 sets for its last task.
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_DISTRIBUTION": "block",
    "SLURMD_NODENAME": "n2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_GTIDS": "2,3",
}


def free_port() -> int:
    """A port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_step(run_dir: Path, step: int, process) -> None:
    """Until the record holds ``step``; fails where the process ends before."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and f'"step": {step},' in (run_dir / "metrics.jsonl").read_text():
            return
        time.sleep(0.005)
    with suppress(ProcessLookupError):  # it may train for hours
        os.killpg(process.pid, signal.SIGKILL)
    output, errors = process.communicate()
    pytest.fail(f"step {step} was not reached while the run was alive:\n{output}{errors}")
