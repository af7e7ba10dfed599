"""Who asks a running training to save, or to save and leave: signals, files in RUN/triggers, and the end of the job.

What any rank is asked for travels in the reduction that every step begins with, so all ranks learn of it at the same
boundary between two steps. Nothing of the next step has been computed then. What became of the launch is told to the
job script by a file: RUN/interrupted or RUN/finished.
"""

import json
import os
import signal
import time
from pathlib import Path

from megat2i.checkpoint import longest_save
from megat2i.files import DataFileError, read_json_object, write_file
from megat2i.interrupt import EXIT_CODE, INTERRUPTED, SIGNALS
from megat2i.progress import say

SIGNALED = {
    "SIGINT": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
    "SIGUSR1": signal.SIGUSR1,
    "SIGUSR2": signal.SIGUSR2,
}
TRIGGERS = ("triggers/exit", "triggers/save")
TIME_LIMIT = "time limit"
LEAVING = ("SIGINT", "SIGTERM", "SIGUSR1", TIME_LIMIT, "triggers/exit")  # the first that applies is the reason
REASONS = (*LEAVING, "SIGUSR2", "triggers/save")
FINISHED = "finished"
JOB_END = "triggers/job_end"

LOOK_EVERY_S = 2.0  # between two looks for files
PATIENCE_S = 20.0  # for a step that is to end, at least: launchers and SLURM kill after 30
# A guess of how long a save takes, until one was measured; careful, for a storage that is busy.
GUESS_S, GUESS_BYTES_PER_S = 5.0, 200e6


class SaveRequested(Exception):
    """Raised on all ranks at the same boundary, with what any of them was asked for (of REASONS)."""

    def __init__(self, reasons: list[str]):
        super().__init__(*reasons)
        self.reasons = reasons

    @staticmethod
    def of(flags: list[int]) -> "SaveRequested":
        """``flags``: for each of REASONS how many ranks are asked for it."""
        return SaveRequested([reason for reason, ranks in zip(REASONS, flags, strict=True) if ranks])

    @property
    def leaving(self) -> str | None:
        """The reason to leave after the save; None where the training goes on."""
        return self.reasons[0] if self.reasons[0] in LEAVING else None

    @property
    def exit_code(self) -> int:
        """Of the launch: as after any Ctrl-C, else 0, since nothing has failed."""
        return EXIT_CODE if self.leaving == "SIGINT" else 0

    def __str__(self) -> str:
        return "Ctrl-C" if self.reasons[0] == "SIGINT" else self.reasons[0]

    def record(self, run_dir: Path, step: int) -> None:
        """RUN/interrupted, and a line on how to go on: it leaves after ``step``, which is committed (0: none)."""
        job = os.environ.get("SLURM_JOB_ID")
        content = {"step": step, "reason": self.reasons[0], "job": job}
        content["restart"] = os.environ.get("SLURM_RESTART_COUNT", "0") if job else None
        _write(run_dir / INTERRUPTED, content)
        where = f"after step {step:,}, which is saved" if step else "before the first step"
        say(f"stopped {where} ({self}): the same command with --resume goes on from there")


class SaveRequests:
    """What this rank is asked for, and how long steps and saves take here.

    ``run_dir``: where files are looked for, on the first rank; None elsewhere. ``state_bytes``: of a checkpoint, for
    the guess of how long a save takes. ``saved_step``: the newest step that needs no save.
    """

    def __init__(self, run_dir: Path | None = None, state_bytes: int = 0, saved_step: int = 0):
        self.saved_step = saved_step
        self._run_dir, self._guess = run_dir, GUESS_S + state_bytes / GUESS_BYTES_PER_S
        self._steps, self._step_s, self._began = 0, 0.0, None
        self._looked, self._files, self._job_end, self._told = -LOOK_EVERY_S, [], None, False

    def begin(self) -> None:
        """From now on signals ask for a save, and do not end the process."""
        SIGNALS.answered_within(lambda: max(PATIENCE_S, self.reserve_s), peers=True)

    def flags(self) -> list[int]:
        """For each of REASONS whether it holds for this rank, at the beginning of a step."""
        now = time.monotonic()
        if self._began is not None:
            self._steps += 1
            slowest = self._step_s if self._steps > 2 else 0.0  # the first step is slower than all others
            self._step_s = max(slowest, now - self._began)
        self._began = now
        asked = {reason for reason, number in SIGNALED.items() if number in SIGNALS.asked}
        if self._run_dir is not None:
            self._look(now)
            asked.update(self._files)
            if self._job_end is not None and self._job_end - time.time() < self.reserve_s:
                asked.add(TIME_LIMIT)
        return [int(reason in asked) for reason in REASONS]

    @property
    def reserve_s(self) -> float:
        """Seconds that two steps and two saves take."""
        return 2 * (self._step_s + (longest_save() or self._guess))

    def hold(self) -> None:
        """A save begins: however long it takes, it is not given up."""
        SIGNALS.answered_within(lambda: float("inf"))

    def saved(self, step: int, seconds: float) -> None:
        """The state after ``step`` is safe, or will be; the training stood still for it for ``seconds``."""
        self.saved_step = step
        if self._began is not None:
            self._began += seconds  # no part of a step

    def answered(self, request: SaveRequested) -> None:
        """What all ranks have agreed on is done."""
        SIGNALS.forget(signal.SIGUSR2)  # whoever asks to leave need not ask again
        self._began = None
        if self._run_dir is not None:
            for name in TRIGGERS:
                if name in request.reasons:
                    (self._run_dir / name).unlink(missing_ok=True)
            self._files = []

    def end(self, request: SaveRequested | None) -> None:
        """The training has ended; where a ``request`` ended it, its signals may still arrive."""
        SIGNALS.answered_within((lambda: PATIENCE_S) if request else None)

    def _look(self, now: float) -> None:
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        self._files = [name for name in TRIGGERS if (self._run_dir / name).exists()]
        self._job_end = self._read_job_end()

    def _read_job_end(self) -> float | None:
        """Unix time at which this SLURM job ends; None where its job script does not say it."""
        path, job = self._run_dir / JOB_END, os.environ.get("SLURM_JOB_ID")
        if job is None or not path.exists():
            return None
        try:
            content = read_json_object(path, "It is ignored until it is written anew")
            if str(content.get("job")) != job:  # of an earlier job
                return None
            if not isinstance(content.get("end"), int | float):
                raise DataFileError(path, "'end' is not a number of seconds", "It is ignored until it is written anew")
            return float(content["end"])
        except DataFileError as error:
            if not self._told:
                say(str(error))
            self._told = True
            return None


def record_finished(run_dir: Path, step: int) -> None:
    """RUN/finished: the schedule has come to its end, ``step``."""
    _write(run_dir / FINISHED, {"step": step})


def forget_end(run_dir: Path) -> None:
    """A new launch begins: what became of the last one is no news."""
    for name in (INTERRUPTED, FINISHED):
        (run_dir / name).unlink(missing_ok=True)


def _write(path: Path, content: dict) -> None:
    write_file(path, (json.dumps(content) + "\n").encode())
