"""How far long work is and how long it still takes: a bar in a terminal, a line now and then in a log file.

A terminal shows it from the first second on. A log file gets a first line after 3 seconds, then one every 20 seconds,
and no carriage returns. Both are written by a thread, so that a single long step does not look like a standstill.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from tqdm import tqdm

from megat2i.printable import printable

FIRST_LINE, LINE_EVERY = 3.0, 20.0  # seconds, in a log file
FIRST_BAR, BAR_EVERY = 0.5, 0.2  # seconds, in a terminal
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
ENDLESS_BAR, CLOCK = "{desc}: {n_fmt}{unit} [{elapsed}{postfix}]", "{desc}: [{elapsed}{postfix}]"
Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Hand on ``items`` and show how many are done. ``total``: their number, by default ``len`` where there is one."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(total, what, unit) as shown:
        for item in items:
            yield item
            shown.update()


def size_in_words(number: float) -> str:
    """``number`` bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.4g} TB"


def count(number: int, noun: str) -> str:
    """A number of things in words: "1 image", "2,000 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def say(line: str) -> None:
    """Print one line to the standard output, above a bar if there is one."""
    tqdm.write(printable(line), file=sys.stdout)
    sys.stdout.flush()  # else a log file holds it after the lines of progress that follow


def waiting(what: str, show: bool = True) -> AbstractContextManager:
    """Show, around a block of unknown length, what is waited for and since when; only one of several ranks shows it."""
    return Progress(None, what, "") if show else nullcontext()


class Progress:
    """What is done of ``total`` (None: not known) pieces of ``what``; ``unit`` in the plural, "bytes" as kB and MB.

    ``initial`` pieces were done before, so the speed is not taken from them. Used as a context manager, or closed.
    """

    def __init__(self, total: int | None, what: str, unit: str, initial: int = 0):
        self.total, self.what, self.unit, self.done, self.skipped = total, printable(what), unit, initial, initial
        self._note, self._started, self._lines = "", time.monotonic(), 0
        self._bar: tqdm | None = None
        self._terminal = sys.stderr.isatty()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_showing, daemon=True, name="progress")
        self._thread.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, number: int = 1) -> None:
        """Count ``number`` more pieces."""
        self.done += number

    def skip(self, number: int) -> None:
        """Count ``number`` pieces that an earlier run did: they say nothing about the speed of this one."""
        self.done += number
        self.skipped += number

    def note(self, text: str) -> None:
        """What stands behind the numbers from now on, such as a loss."""
        self._note = printable(text)

    def close(self) -> None:
        """Show the last state, if any was shown before, and stop. A second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if self._bar is not None:
            self._draw()
            self._bar.close()
        elif self._lines and self.done:  # a wait without pieces has no last state to tell
            self._write_line()

    def _keep_showing(self) -> None:
        first, interval, show = FIRST_LINE, LINE_EVERY, self._write_line
        if self._terminal:
            first, interval, show = FIRST_BAR, BAR_EVERY, self._draw
        wait = first
        while not self._ended.wait(wait):
            show()
            wait = interval

    def _draw(self) -> None:
        if self._bar is None:
            sized = self.unit == "bytes"
            unit = "B" if sized else f" {self.unit}"
            self._bar = tqdm(
                desc=self.what, unit=unit, unit_scale=sized, mininterval=0, delay=1e-9
            )  # no empty bar at once
            self._bar.start_t -= time.monotonic() - self._started
        endless = ENDLESS_BAR if self.done else CLOCK
        self._bar.bar_format = endless if self.total is None else BAR
        self._bar.total, self._bar.initial = self.total, self.skipped
        self._bar.n = self.done
        self._bar.set_description_str(self.what, refresh=False)
        self._bar.set_postfix_str(self._note, refresh=False)
        self._bar.refresh()

    def _write_line(self) -> None:
        self._lines += 1
        print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """The state in words: what, how far, time so far, time left, speed."""
        seconds = time.monotonic() - self._started
        speed = (self.done - self.skipped) / seconds if seconds else 0.0
        parts = []
        if self.total is not None:
            share = self.done / self.total if self.total else 1.0
            parts.append(f"{self._number(self.done)} of {self._number(self.total)} {self._plural()}({share:.0%})")
        elif self.done:
            parts.append(f"{self._number(self.done)} {self._plural()}".rstrip())
        parts.append(f"{tqdm.format_interval(seconds)} so far")
        if self.total is not None and speed and self.done < self.total:
            parts.append(f"{tqdm.format_interval((self.total - self.done) / speed)} left")
        if speed:
            parts.append(f"{self._number(speed)} {self._plural()}".rstrip() + "/s")
        return f"{self.what}: " + ", ".join(parts + ([self._note] if self._note else []))

    def _plural(self) -> str:
        return "" if self.unit == "bytes" or not self.unit else f"{self.unit} "

    def _number(self, value: float) -> str:
        if self.unit == "bytes":
            return tqdm.format_sizeof(value, "B")
        return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
