"""Where this rank stands: marks of its step and phase, in memory that its watchdog reads.

The marks belong to the process, as a log does: any floor may set one, and without a watchdog they cost nothing.
"""

import dataclasses
import faulthandler
import json
import mmap
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from megat2i import watchdog
from megat2i.config import ConfigError
from megat2i.launch import Launch
from megat2i.watchdog import DUMP_SIGNAL, HOLD, MARK, NUMBER, ORDER_AT, PHASES, RECORD_BYTES, TICKS_AT, look_interval

NUMBERS = {phase: number for number, phase in enumerate(PHASES)}


class _Marks:
    """The memory that the rank and its watchdog share, and the thread that shows that the process runs."""

    def __init__(self):
        self.descriptor = os.memfd_create("marks")
        os.ftruncate(self.descriptor, RECORD_BYTES)
        self._memory = mmap.mmap(self.descriptor, RECORD_BYTES)
        self._count = self._step = self._phase = 0

    def set(self, phase: int, step: int) -> None:
        self._count += 1
        self._step, self._phase = step, phase
        MARK.pack_into(self._memory, 0, self._count, step, phase)

    def beat(self) -> None:
        self.set(self._phase, self._step)

    def enter(self, phase: str, step: int | None) -> None:
        step = self._step if step is None else step
        # The self-test takes a training step before the first one: still a self-test.
        self.set(NUMBERS[phase] if step or phase in watchdog.START else self._phase, step)

    def tick(self, interval: float) -> None:
        """Show that the process runs, and do what the watchdog orders."""
        ticks, never = 0, threading.Event()
        while not never.wait(interval):
            ticks += 1
            NUMBER.pack_into(self._memory, TICKS_AT, ticks)
            (order,) = NUMBER.unpack_from(self._memory, ORDER_AT)
            if order == HOLD:
                sys.excepthook = lambda kind, error, traceback: never.wait()
            elif order:
                os._exit(order)  # the main thread may never return


_marks: _Marks | None = None


def mark(phase: str, step: int | None = None) -> None:
    """This rank enters ``phase``, one of ``watchdog.PHASES``, of ``step`` (None: the same as before)."""
    if _marks is not None:
        _marks.enter(phase, step)


def beat() -> None:
    """A piece of the phase is done. Every rank must say so more often than ``runtime.watchdog_s``."""
    if _marks is not None:
        _marks.beat()


def start_watchdog(run_dir: Path, limit: float, launch: Launch) -> None:
    """Start the watchdog of this process. ``limit``: seconds without progress, see ``watchdog``.

    Raises ConfigError where the system lacks what it needs.
    """
    global _marks
    place = re.sub(r"\W", "-", f"{launch.host}-{launch.port}")
    try:
        _marks = _Marks()
        stacks = os.memfd_create("stacks")  # stays open: a signal handler writes to it
        process, launcher = os.pidfd_open(os.getpid()), _launcher() if launch.local_rank == 0 else None
    except (AttributeError, OSError) as error:
        raise ConfigError(f"this system cannot run the watchdog ({error}): set runtime.watchdog_s=0") from error
    faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True)
    settings = watchdog.Settings(
        rank=launch.rank,
        local_rank=launch.local_rank,
        world_size=launch.world_size,
        pid=os.getpid(),
        main_thread=threading.main_thread().ident,
        limit=limit,
        folder=str(run_dir.resolve() / "hang" / place),
        process_fd=process,
        record_fd=_marks.descriptor,
        stacks_fd=stacks,
        launcher_fd=launcher,
    )
    descriptors = [number for number in (process, _marks.descriptor, stacks, launcher) if number is not None]
    command = [sys.executable, "-I", "-S", watchdog.__file__, json.dumps(dataclasses.asdict(settings))]
    subprocess.run(command, pass_fds=descriptors, stdin=subprocess.DEVNULL, check=True)  # it goes on as a daemon
    os.close(process)
    if launcher is not None:
        os.close(launcher)
    threading.Thread(target=_marks.tick, args=(look_interval(limit),), daemon=True, name="ticks").start()


def _launcher() -> int | None:
    """A descriptor of the process that started this one; None where it is outside this container."""
    parent = os.getppid()
    return os.pidfd_open(parent) if parent else None
