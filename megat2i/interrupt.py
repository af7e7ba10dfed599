"""Ctrl-C, and the end of the launcher: one sentence from the first rank, no traceback, and all ranks end.

A signal is taken by a thread, because the main one may sit in a collective that ends only when its peers are there.
Nothing is saved on the way out: whatever is committed, a kill leaves it sound.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megat2i.files import step_of
from megat2i.last_words import leave
from megat2i.processes import Process, launchers_above

TOGETHER = 0.2  # seconds within which two signals count as one event
HEAD_START = 0.5  # seconds for the first rank, which would else see the others go before it has spoken
LOOK_EVERY = 0.5  # seconds between two looks at the launcher
EXIT_CODE = 128 + signal.SIGINT  # as shells have it
ORPHANED = 1  # exit code where the launcher has ended
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies


def leave_on_interrupt(sentence: Callable[[], str] | None) -> None:
    """From now on Ctrl-C ends this process at once with EXIT_CODE; the first rank gives a ``sentence`` to be said.

    SIGTERM ends it without a word, as it always did. The end of the launcher of several ranks, whatever ended it, ends
    it as Ctrl-C does, with ORPHANED; raises SystemExit where it has ended already.
    """
    launchers = launchers_above()
    if launchers is None:
        raise SystemExit("error: the launcher has ended before its ranks began" if sentence else ORPHANED)
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as set_wakeup_fd demands
    signal.set_wakeup_fd(writer.fileno())
    # The thread does it all. SIGTERM too: with it DeepSpeed's launcher answers Ctrl-C, and would cut the sentence off.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    arguments = (reader, writer, launchers, sentence)
    threading.Thread(target=_wait, args=arguments, daemon=True, name="interrupt").start()


def _wait(
    reader: socket.socket, writer: socket.socket, launchers: list[Process], sentence: Callable[[], str] | None
) -> None:
    number = _next_signal(reader, launchers)
    # On a busy machine both signals of a launcher are there before either is taken, and the later one is taken first;
    # and its end may be seen before the signal that it passed on.
    if number != signal.SIGINT:
        number = _follows(reader) or number
    # The main thread may meet the end of another rank now; what it says of that is no news.
    sys.excepthook = lambda kind, error, traceback: threading.Event().wait()
    try:
        if number != signal.SIGTERM and sentence is None:
            time.sleep(HEAD_START)
        elif number != signal.SIGTERM:
            text = sentence() if number else f"the launcher has ended; {sentence()}"
            tqdm.get_lock().acquire()  # for good: the bar must not be drawn again
            print(_new_line() + text, file=sys.stderr, flush=True)
        if not number:  # a rank that has not seen the launcher's end yet would report this one's with a traceback
            time.sleep(2 * LOOK_EVERY)
    finally:
        leave()
        os._exit(128 + number if number else ORPHANED)  # also where the sentence fails: nothing else listens


def _next_signal(reader: socket.socket, launchers: list[Process]) -> int:
    """SIGINT or SIGTERM when it arrives, 0 when one of ``launchers`` has ended."""
    reader.settimeout(LOOK_EVERY)
    while all(launcher.alive for launcher in launchers):
        try:
            number = reader.recv(1)[0]
        except TimeoutError:
            continue
        if number in (signal.SIGINT, signal.SIGTERM):  # other signals with a Python handler come here too
            return number
    return 0


def _follows(reader: socket.socket) -> int:
    """SIGINT, else SIGTERM, where it arrives within TOGETHER; else 0."""
    reader.settimeout(TOGETHER)
    try:
        arrived = reader.recv(64)
    except TimeoutError:
        return 0
    return next((number for number in (signal.SIGINT, signal.SIGTERM) if number in arrived), 0)


def _new_line() -> str:
    return "\n" if sys.stderr.isatty() else ""  # behind the ^C of the terminal


def end_with_parent() -> None:
    """For ``preexec_fn`` of a child process: a parent that is killed takes the child with it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def said_on_interrupt(sentence: str) -> Iterator[None]:
    """Ctrl-C in the block ends the process with ``sentence`` and EXIT_CODE, after everything was tidied up."""
    try:
        yield
    except KeyboardInterrupt:
        print(_new_line() + sentence, file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


def stopped(run_dir: Path) -> str:
    """Where a training run stands, by the files of its folder, and how it goes on."""
    steps = [step_of(path.name) for path in (run_dir / "checkpoints").glob("step-*")]
    steps = [step for step in steps if step is not None]  # a copy under another name is none
    last = _last_step(run_dir / "metrics.jsonl")
    if last is None:
        return "stopped before the first step"
    if not steps:
        return f"stopped after step {last:,}; there is no checkpoint yet: --resume starts from the beginning"
    return f"stopped after step {last:,}; the last checkpoint is step {max(steps):,}; --resume continues from there"


def _last_step(metrics: Path) -> int | None:
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # the line that was being written
            continue
    return None
