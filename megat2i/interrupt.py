"""Ctrl-C: one sentence from the first rank, no traceback, exit code 130 from all.

The signal is taken by a thread, because the main one may sit in a collective that ends only when its peers are there.
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

TOGETHER = 0.2  # seconds within which two signals count as one event
HEAD_START = 0.5  # seconds for the first rank, which would else see the others go before it has spoken
EXIT_CODE = 128 + signal.SIGINT  # as shells have it
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies


def leave_on_interrupt(sentence: Callable[[], str] | None) -> None:
    """From now on Ctrl-C ends this process at once with EXIT_CODE; the first rank gives a ``sentence`` to be said.

    SIGTERM ends it without a word, as it always did.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as set_wakeup_fd demands
    signal.set_wakeup_fd(writer.fileno())
    # The thread does it all. SIGTERM too: with it DeepSpeed's launcher answers Ctrl-C, and would cut the sentence off.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    threading.Thread(target=_wait, args=(reader, writer, sentence), daemon=True, name="interrupt").start()


def _wait(reader: socket.socket, writer: socket.socket, sentence: Callable[[], str] | None) -> None:
    number = 0
    while number not in (signal.SIGINT, signal.SIGTERM):  # other signals with a Python handler come here too
        number = reader.recv(1)[0]
    # On a busy machine both signals of a launcher are there before either is taken, and the later one is taken first.
    if number == signal.SIGTERM and _follows(reader, signal.SIGINT):
        number = signal.SIGINT
    # The main thread may meet the end of another rank now; what it says of that is no news.
    sys.excepthook = lambda kind, error, traceback: threading.Event().wait()
    try:
        if number == signal.SIGINT and sentence is None:
            time.sleep(HEAD_START)
        elif number == signal.SIGINT:
            text = sentence()
            tqdm.get_lock().acquire()  # for good: the bar must not be drawn again
            print(_new_line() + text, file=sys.stderr, flush=True)
    finally:
        os._exit(128 + number)  # also where the sentence fails: nothing else listens to the signals


def _follows(reader: socket.socket, number: int) -> bool:
    """Whether the signal ``number`` arrives within TOGETHER."""
    reader.settimeout(TOGETHER)
    try:
        return number in reader.recv(64)
    except TimeoutError:
        return False


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
