"""Progress of long work, as a log file and as a terminal show it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from megat2i.progress import Progress, progress

WORK = """
import time
from megat2i import progress
progress.FIRST_LINE, progress.LINE_EVERY = 0.3, 0.5
for number in progress.progress(range(10), "fitting", "iterations"):
    time.sleep(0.12)
    if number == 5:
        progress.say("held out: 3.2")
with progress.Progress(None, "training the text tokenizer", "captions"):
    time.sleep(1.0)  # one long step without a sign of life of its own
for _ in progress.progress([1, 2], "short work", "pieces"):
    pass
"""


def in_terminal(*command: str) -> str:
    """What ``command`` writes to a terminal of 100 columns."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    written = b""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # what Linux says when the other side has closed
            break
        written += piece
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, written.decode()
    return written.decode()


def test_a_log_file_gets_lines_and_no_carriage_returns(tmp_path):
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", WORK], stdout=log, stderr=log, check=True)
    text = (tmp_path / "log").read_text()
    lines = text.splitlines()
    assert "\r" not in text and "held out: 3.2" in lines and "short work" not in text
    fitting = [line for line in lines if line.startswith("fitting: ")]
    assert re.fullmatch(
        r"fitting: [1-9] of 10 iterations \(\d0%\), 00:0\d so far, 00:0\d left, [\d.]+ iterations/s", fitting[0]
    )
    assert len(fitting) >= 3 and fitting[-1].startswith("fitting: 10 of 10 iterations (100%), 00:0")
    silent = [line for line in lines if line.startswith("training the text tokenizer: ")]
    assert len(silent) >= 2 and re.fullmatch(r"training the text tokenizer: 00:0\d so far", silent[0])


def test_a_terminal_gets_one_bar_and_lines_above_it():
    states = in_terminal(sys.executable, "-c", WORK).replace("\r\n", "\n").split("\r")
    bars = [state for state in states if state.startswith("fitting: ")]
    assert len(bars) >= 3 and all(len(bar.strip()) <= 100 for bar in bars)
    assert re.search(r"\d0%\|.* [1-9]/10 \[00:0\d<00:0\d, ", bars[0]) and "10/10" in bars[-1]
    assert any(state.startswith("held out: 3.2\n") for state in states)
    assert any(state.startswith("training the text tokenizer: [00:0") for state in states)
    assert not any("short work" in state for state in states)


def test_pieces_of_an_earlier_run_do_not_count_as_speed():
    shown = Progress(100, "encoding", "images", initial=40)
    shown.skip(50)
    shown._started -= 10.0
    shown.update(5)
    shown.note("2 refused")
    shown.close()
    shown.close()
    expected = r"encoding: 95 of 100 images \(95%\), 00:10 so far, 00:10 left, 0\.(5|49\d?) images/s, 2 refused"
    assert re.fullmatch(expected, shown.line())


def test_sizes_are_told_in_bytes_and_an_error_ends_the_thread():
    with Progress(3_000_000, "digests", "bytes") as shown:
        shown.update(1_500_000)
        shown._started -= 1.0
        assert shown.line().startswith("digests: 1.50MB of 3.00MB (50%), 00:01 so far, 00:01 left, 1.")
    failing = progress(iter([1]), "failing", "pieces")
    next(failing)
    failing.close()
    assert not shown._thread.is_alive()
