"""Waiting for a training that was launched as a command."""

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest


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
