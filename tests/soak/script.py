"""One rank of a training: ``pretrain_t2i.py`` itself, with steps that last long enough to be hit by a fault.

The campaign's forked ranks call ``run``; a launcher starts this file as it would start ``pretrain_t2i.py``. The
environment variable SOAK holds the fields of ``Pace`` as JSON.
"""

import json
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "pretrain_t2i.py"
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")  # audit events that change a folder


@dataclass(frozen=True)
class Pace:
    """``seconds`` of every step beside its own, ``steps`` the file that gets a byte for each step begun.

    ``hold``: while this file exists no step begins. ``kill_at``: the change of a file below ``root`` at which rank
    ``kill_rank`` kills itself; 0: none. ``clock``: seconds that this process's clock differs before and from step
    ``clock_step`` of the launch on.
    """

    seconds: float
    steps: str
    hold: str
    root: str
    kill_at: int = 0
    kill_rank: int = 0
    clock: tuple[float, float] = (0.0, 0.0)
    clock_step: int = 0


def run(pace: Pace, arguments: list[str]) -> None:
    """Run the training script with ``arguments``; it ends as a script does, by returning or by SystemExit."""
    begun = _pace_steps(pace)
    if any(pace.clock):
        true_time = time.time
        time.time = lambda: true_time() + pace.clock[begun[0] >= pace.clock_step]
    if pace.kill_at and int(os.environ.get("RANK", "0")) == pace.kill_rank:
        _kill_at_change(pace.kill_at, pace.root)
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def _pace_steps(pace: Pace) -> list[int]:
    """Slow every step down; returns a list whose one number counts the steps that this process has begun."""
    from megat2i.data.batches import TrainingData

    begun, micro_batches = [0], TrainingData.micro_batches

    def paced(self, step: int, **rank):
        if os.environ.get("RANK", "0") == "0":
            with open(pace.steps, "ab") as file:
                file.write(b".")
        time.sleep(pace.seconds)
        while os.path.exists(pace.hold):
            time.sleep(0.01)
        begun[0] += 1
        return micro_batches(self, step, **rank)

    TrainingData.micro_batches = paced
    return begun


def _kill_at_change(number: int, root: str) -> None:
    """SIGKILL this process at its ``number``-th change of a file or folder below ``root``, counted before and after."""
    changes, sync = [0], os.fsync

    def count() -> None:
        changes[0] += 1
        if changes[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        changing = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changing and str(arguments[0]).startswith(root):
            count()

    def counted_sync(descriptor: int) -> None:
        count()
        sync(descriptor)
        count()

    sys.addaudithook(hook)
    os.fsync = counted_sync


if __name__ == "__main__":
    run(Pace(**json.loads(os.environ["SOAK"])), sys.argv[1:])
