"""Which rank is the slowest, in a training whose ranks wait for each other.

Every step takes as long on each rank as on the slowest one, so the time of steps tells nothing. Each rank times what
it does alone: a small product of fixed matrices on its own device, and the reading of its rows. Waiting for others is
in neither. Now and then one small reduction makes the means of all known to all.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megat2i.checkpoint.agreement import device_of_collectives, from_rank
from megat2i.progress import say

FILE = "slowest_rank.json"
REPORT_EVERY = 50  # steps
PROBE_EVERY = 5  # steps: ten products a report
SIDE = {"cpu": 256, "cuda": 2048}  # of the matrices: below a millisecond or about one
CLEARLY = 0.2  # share above the median from which on a rank is clearly slower
IN_A_ROW = 3  # reports on the same rank before it is said: a busy moment is none
Result = TypeVar("Result")


class Verdict(NamedTuple):
    """The slowest rank, by which share it is slower than the median, and at what."""

    rank: int
    slower: float
    at: str

    @property
    def clearly(self) -> bool:
        return self.slower > CLEARLY


def verdict(compute_s: list[float], data_s: list[float], step_s: float) -> Verdict:
    """Of the ranks' mean seconds for the product and for reading, and the seconds of a step.

    What a rank reads longer than the median counts as a share of the step: that is what the others wait for.
    """
    base, usual = statistics.median_low(compute_s), statistics.median_low(data_s)
    computing = [Verdict(rank, seconds / base - 1, "a fixed product") for rank, seconds in enumerate(compute_s)]
    reading = [Verdict(rank, (seconds - usual) / step_s, "reading data") for rank, seconds in enumerate(data_s)]
    return max(computing + reading, key=lambda one: one.slower)


class SlowestRank:
    """Times this rank's work; rank 0 says which is clearly slower than the median, and writes RUN/slowest_rank.json.

    With a single rank it does nothing.
    """

    def __init__(self, run_dir: Path, device: torch.device):
        self.path, self._device = run_dir / FILE, device
        self._active = dist.get_world_size() > 1
        side = SIDE[device.type]
        self._matrix = torch.full((side, side), 1 / side, device=device) if self._active else None
        self._slow: list[int] = []  # the rank of each report that named one clearly, as long as it is the same
        self._begin()

    def _begin(self) -> None:
        self._data_s = self._step_s = 0.0
        self._steps, self._products = 0, []

    def reading(self, step: int, read: Callable[[], Result]) -> Result:
        """What ``read`` returns; its time counts, and now and then the product's."""
        if not self._active:
            return read()
        if step % PROBE_EVERY == 0:
            self._products.append(self._product())
        started = time.perf_counter()
        result = read()
        self._data_s += time.perf_counter() - started
        return result

    def step(self, step: int, seconds: float) -> None:
        """``step`` is done, in ``seconds``. Collective where a report is due."""
        self._steps += 1
        self._step_s += seconds
        if not self._active or step % REPORT_EVERY or not self._products:
            return
        table = torch.zeros(dist.get_world_size(), 2, dtype=torch.float64, device=device_of_collectives())
        products = [product() for product in self._products]
        table[dist.get_rank()] = torch.tensor([sum(products) / len(products), self._data_s / self._steps])
        dist.all_reduce(table)
        # That of the first rank, so that all come to the same verdict.
        (nanoseconds,) = from_rank(0, [int(1e9 * self._step_s / self._steps) + 1])
        slowest = verdict(*table.t().tolist(), nanoseconds / 1e9)
        host = bytes(from_rank(slowest.rank, list(os.uname().nodename.encode()))).decode()
        self._begin()
        if dist.get_rank() == 0:
            self._report(step, slowest, host)

    def _product(self) -> Callable[[], float]:
        """Take the product; returns what gives its seconds, later where a device computes it."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.mm(self._matrix, self._matrix)
            end.record()
            return lambda: _seconds_between(start, end)
        started = time.perf_counter()
        torch.mm(self._matrix, self._matrix)
        seconds = time.perf_counter() - started
        return lambda: seconds

    def _report(self, step: int, slowest: Verdict, host: str) -> None:
        self._slow = [rank for rank in self._slow if rank == slowest.rank] if slowest.clearly else []
        self._slow += [slowest.rank] if slowest.clearly else []
        clearly = len(self._slow) >= IN_A_ROW
        if len(self._slow) == IN_A_ROW:
            say(
                f"step {step:,}: rank {slowest.rank} on {host} is {slowest.slower:.0%} slower than the median rank, at "
                f"{slowest.at}, and all wait for it"
            )
        record = {"step": step, **slowest._asdict(), "host": host, "clearly": clearly}
        with suppress(OSError):  # a full disk: the next report is written where it has room
            temporary = self.path.with_name(f"{FILE}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(record) + "\n")
            temporary.replace(self.path)


def _seconds_between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1000
