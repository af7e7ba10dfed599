"""The slowest rank is told apart from those that wait for it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from megat2i import slowest_rank
from megat2i.slowest_rank import REPORT_EVERY, SlowestRank, verdict

# Stops a process for most of the time, as a throttled processor or a busy neighbor does.
THROTTLE = """
import os, signal, sys, time
pid = int(sys.argv[1])
while True:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.006)
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.001)
"""


@pytest.mark.parametrize(
    ("compute_s", "data_s", "rank", "at", "clearly"),
    [
        ([1.0, 1.0, 1.3, 1.0], [0.1] * 4, 2, "a fixed product", True),
        ([1.0, 1.0, 1.1, 1.0], [0.1] * 4, 2, "a fixed product", False),
        ([1.0, 1.5], [0.1] * 2, 1, "a fixed product", True),
        ([1.0] * 3, [0.1, 0.1, 3.0], 2, "reading data", True),
        ([1.0] * 3, [1e-5, 1e-5, 9e-5], 2, "reading data", False),  # nine times as long, of nothing
    ],
)
def test_the_verdict(compute_s, data_s, rank, at, clearly):
    named = verdict(compute_s, data_s, step_s=10.0)
    assert (named.rank, named.at, named.clearly) == (rank, at, clearly)


def train(folder, steps: int, throttled: bool, reading_s: float = 0.0) -> float:
    """Seconds of this rank's steps; rank 1 may be throttled."""
    torch.set_num_threads(1)
    slowest, rank = SlowestRank(folder, torch.device("cpu")), dist.get_rank()
    throttle = [sys.executable, "-c", THROTTLE, str(os.getpid())]
    process = subprocess.Popen(throttle) if throttled and rank == 1 else None
    matrix, began = torch.ones(256, 256), time.perf_counter()
    try:
        for step in range(1, steps + 1):
            started = time.perf_counter()
            slowest.reading(step, lambda: time.sleep(reading_s * rank) or matrix @ matrix)
            dist.all_reduce(torch.zeros(1))
            slowest.step(step, time.perf_counter() - started)
    finally:
        if process:
            process.kill()
            process.wait()
            os.kill(os.getpid(), signal.SIGCONT)
    return time.perf_counter() - began


@pytest.mark.full  # on a busy machine other processes throttle the other rank
def test_a_throttled_rank_is_named_though_all_steps_take_equally_long(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(slowest_rank, "PROBE_EVERY", 1)  # so few steps, so short products: some must meet a stop
    seconds = run_ranks(2, train, tmp_path, 3 * REPORT_EVERY, True)
    assert max(seconds) < 1.5 * min(seconds)  # the time of the steps tells nothing
    record = json.loads((tmp_path / "slowest_rank.json").read_text())
    assert record["rank"] == 1 and record["host"] == os.uname().nodename and record["step"] == 3 * REPORT_EVERY
    assert record["clearly"] and record["slower"] > 0.2
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "slower" in line]
    assert f": rank 1 on {os.uname().nodename} is " in line and "slower than the median rank, at " in line


def test_a_rank_that_waits_for_its_data_is_named(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(slowest_rank, "REPORT_EVERY", 10)
    monkeypatch.setattr(SlowestRank, "_product", lambda self: lambda: 1.0)  # not what is tested, and noisy
    seconds = run_ranks(2, train, tmp_path, 30, False, 0.05)
    assert max(seconds) < 1.5 * min(seconds)  # the time of the steps tells nothing
    record = json.loads((tmp_path / "slowest_rank.json").read_text())
    assert (record["step"], record["rank"], record["at"], record["clearly"]) == (30, 1, "reading data", True)
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "slower" in line]
    assert line.startswith(f"step 30: rank 1 on {os.uname().nodename} is ") and "at reading data, and all wait" in line


def test_a_single_rank_is_not_measured(tmp_path):
    run_ranks(1, train, tmp_path, REPORT_EVERY, False)
    assert list(tmp_path.iterdir()) == []
