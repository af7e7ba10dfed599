"""The signals of a process: one that trains may answer them by saving, any other one leaves with one sentence.

A signal is taken by a thread, because the main one may sit in a collective that ends only when its peers are there.
Until the training begins, and where the main thread does not answer in time, nothing is saved on the way out: whatever
is committed, a kill leaves it sound. The end of the launcher ends its ranks.
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
from megat2i.processes import Process, launchers_above, missing_siblings

TOGETHER = 0.2  # seconds within which two signals count as one event
HEAD_START = 0.5  # seconds for the first rank, which would else see the others go before it has spoken
LOOK_EVERY = 0.5  # seconds between two looks at the launcher
EXIT_CODE = 128 + signal.SIGINT  # as shells have it
ORPHANED = 1  # exit code where the launcher has ended
LAUNCHER_ENDED = 0  # beside the numbers of signals
INTERRUPTED = "interrupted"  # file of a run folder: its launch has saved and left before the end
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies
LEAVE = (signal.SIGINT, signal.SIGTERM)  # who sends them does not wait for ever
TAKEN = (*LEAVE, signal.SIGUSR1, signal.SIGUSR2)
ANSWERS = {
    signal.SIGINT: "Ctrl-C: the run saves after this step and ends; Ctrl-C again ends it at once, without saving",
    signal.SIGTERM: "SIGTERM: the run saves after this step and ends",
    signal.SIGUSR1: "SIGUSR1: the run saves after this step and ends",
    signal.SIGUSR2: "SIGUSR2: the run saves after this step and goes on",
}


def leave_on_interrupt(sentence: Callable[[], str] | None) -> None:
    """From now on Ctrl-C ends this process at once with EXIT_CODE; the first rank gives a ``sentence`` to be said.

    SIGTERM and SIGUSR1 end it without a word, SIGUSR2 is ignored. The end of the launcher of several ranks, whatever
    ended it, ends it as Ctrl-C does, with ORPHANED; raises SystemExit where it has ended already.
    """
    launchers = launchers_above()
    if launchers is None:
        raise SystemExit("error: the launcher has ended before its ranks began" if sentence else ORPHANED)
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as set_wakeup_fd demands
    signal.set_wakeup_fd(writer.fileno())
    # The thread does it all. SIGTERM too: with it DeepSpeed's launcher answers Ctrl-C, and would cut the sentence off.
    for number in TAKEN:
        signal.signal(number, lambda number, frame: None)
    SIGNALS.listen(reader, writer, launchers, sentence)


class Signals:
    """The signals of this process. ``asked``: those that the main thread has been asked to answer, and has not yet."""

    def __init__(self):
        self.asked: set[int] = set()
        self._patience: Callable[[], float] | None = None  # None: nobody answers, so a signal ends the process
        self._asked_at: dict[int, float] = {}
        self._waiting_since, self._peers, self._orphaned = 0.0, False, False

    def listen(
        self, reader: socket.socket, writer: socket.socket, launchers: list[Process], sentence: Callable[[], str] | None
    ) -> None:
        """Start the thread. ``writer`` only has to stay open."""
        self._reader, self._writer, self._launchers, self._sentence = reader, writer, launchers, sentence
        threading.Thread(target=self._listen, daemon=True, name="interrupt").start()

    def answered_within(self, patience: Callable[[], float] | None, peers: bool = False) -> None:
        """From now on the main thread answers ``asked``; SIGINT and SIGTERM within ``patience()`` seconds.

        With None it does not: the process leaves at once.

        A process whose main thread does not is ended: it may sit in a collective whose other ranks are gone. ``peers``:
        an answer needs all ranks, so that it is ended at once where one that the same launcher started has ended.
        """
        self._waiting_since, self._patience, self._peers = time.monotonic(), patience, peers

    def forget(self, number: int) -> None:
        """What ``number`` asked for is done."""
        self.asked.discard(number)

    def _listen(self) -> None:
        while True:
            number = self._next()
            if number == LAUNCHER_ENDED:
                # On a busy machine its end may be seen before the signal that it passed on.
                number = LAUNCHER_ENDED if self._leaves() else self._follows((*LEAVE, signal.SIGUSR1))
                self._orphaned = True
            if self._patience is None and number in (LAUNCHER_ENDED, *LEAVE, signal.SIGUSR1):
                # Both signals of a launcher may be there before either is taken, and the later one is taken first.
                self._leave(number if number == signal.SIGINT else self._follows(LEAVE) or number)
            if number == LAUNCHER_ENDED and not self._leaves():
                self._leave(number)
            if number in TAKEN and self._patience is not None:
                self._take(number)
            self._end_what_waits_in_vain()

    def _leaves(self) -> set[int]:
        return self.asked - {signal.SIGUSR2}

    def _next(self) -> int | None:
        """A signal, or LAUNCHER_ENDED, once; None where LOOK_EVERY passes without either."""
        if not all(launcher.alive for launcher in self._launchers):
            self._launchers = []
            return LAUNCHER_ENDED
        self._reader.settimeout(LOOK_EVERY)
        try:
            return self._reader.recv(1)[0]  # other signals with a Python handler come here too
        except TimeoutError:
            return None

    def _follows(self, numbers: tuple[int, ...]) -> int:
        """The first of ``numbers`` that arrives within TOGETHER; else 0."""
        self._reader.settimeout(TOGETHER)
        try:
            arrived = self._reader.recv(64)
        except TimeoutError:
            return 0
        return next((number for number in numbers if number in arrived), 0)

    def _take(self, number: int) -> None:
        """Ask the main thread to answer ``number``; a second Ctrl-C does not wait for it."""
        now = time.monotonic()
        if number in self.asked:
            if number == signal.SIGINT and now - self._asked_at[number] > TOGETHER:
                self._leave(number)
            return
        new = number not in LEAVE or not self.asked.intersection(LEAVE)
        self._asked_at[number] = now
        self.asked.add(number)
        if number == signal.SIGTERM and new and self._follows((signal.SIGINT,)):  # taken in the wrong order
            number = signal.SIGINT
            self._asked_at[number] = now
            self.asked.add(number)
        if self._sentence is not None and new:
            tqdm.write(_new_line() + ANSWERS[number], file=sys.stderr)
            sys.stderr.flush()

    def _end_what_waits_in_vain(self) -> None:
        bounded = self._leaves() if self._orphaned else self._leaves() & set(LEAVE)
        if not bounded or self._patience is None:
            return
        number, patience = min(bounded), self._patience()  # SIGINT is the lowest
        waited = time.monotonic() - max(self._waiting_since, self._asked_at[number])
        if waited > patience:
            self._leave(number, f"this step did not end within {patience:.0f} s, so nothing was saved; ")
        if self._peers and not self._orphaned and self._launchers and missing_siblings():
            self._leave(number, "another rank has ended, so nothing was saved; ")

    def _leave(self, number: int, reason: str = "") -> None:
        """End the process, with a sentence from the first rank unless SIGTERM or SIGUSR1 came to a start-up."""
        silent = number in (signal.SIGTERM, signal.SIGUSR1) and not reason
        # The main thread may meet the end of another rank now; what it says of that is no news.
        sys.excepthook = lambda kind, error, traceback: threading.Event().wait()
        try:
            if not silent and self._sentence is None:
                time.sleep(HEAD_START)
            elif not silent:
                text = self._sentence() if number else f"the launcher has ended; {self._sentence()}"
                tqdm.get_lock().acquire()  # for good: the bar must not be drawn again
                print(_new_line() + reason + text, file=sys.stderr, flush=True)
            if not number:  # a rank that has not seen the launcher's end yet would report this one's with a traceback
                time.sleep(2 * LOOK_EVERY)
        finally:
            os._exit(128 + number if number else ORPHANED)  # also where the sentence fails: nothing else listens


SIGNALS = Signals()


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
