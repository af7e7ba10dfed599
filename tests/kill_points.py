"""Kills a forked process at each of its file operations in turn, as a power cut or ``kill -9`` may."""

import gc
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EVENTS = {
    "open",
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.utime",
}


def kill_points(folder: Path, prepare: Callable[[], None], write: Callable[[], None], stride: int = 1) -> Iterator[int]:
    """Yields after each kill of ``write``, 1, 1 + ``stride``, ... until it gets through; ``prepare`` comes before each.

    Operations on what lies below ``folder`` count, and every fsync twice: before and after it.
    """
    for number in itertools.count(1, stride):
        prepare()

        def killed(number=number) -> None:
            kill_at(number, folder)
            write()

        code = exit_code(killed)
        if code == 0:
            return
        assert code == -signal.SIGKILL, f"point {number}: the writer failed by itself"
        yield number


def exit_code(action: Callable[[], None]) -> int:
    """Exit code of a forked process that calls ``action``; an exception is printed, and is 1."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        gc.disable()  # a collection would copy the pages of the parent's objects
        action()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def kill_at(point: int, folder: Path) -> None:
    """SIGKILL for this process at its file operation number ``point``, just before it happens."""
    counted = 0

    def count() -> None:
        nonlocal counted
        counted += 1
        if counted == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(str(folder)):
            count()

    def fsync(descriptor: int, really: Callable[[int], None] = os.fsync) -> None:
        count()
        really(descriptor)
        count()

    sys.addaudithook(hook)
    os.fsync = fsync
