"""How a rank ended: what it says itself, and the sentence on the one that ended the launch.

A rank writes its last words to memory that outlives it: an exception, a fatal signal, or that it left in good order.
Its watchdog becomes this program when the rank has ended. The first rank of a launch that died gives the sentence,
once; behind a launcher of several ranks it comes after the launcher's own words. The others only lost a peer: they say
nothing of that. Needs the standard library alone.
"""

import atexit
import faulthandler
import json
import os
import re
import select
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LEFT, PEER, RAISED = "left in good order\n", "lost a peer\n", "raised\n"
# How gloo, NCCL and the store say that another rank is gone.
LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|Socket [Tt]imeout|ncclRemoteError"
    r"|Timed out waiting|Connection refused|[Ff]ailed to (recv|send)|Application timeout caused pair closure"
)
SENTENCE, SPEAKER = "-ended.txt", "-ended-speaker.txt"  # behind the name of the folder of the watchdogs' files
PEER_WAITS = 3.0  # seconds for the sentence on the rank that died to be there
LAUNCHER_WAITS = 10.0  # seconds for the launcher's words
LIFETIME = 40  # seconds of this program, where a file system hangs
LINES = 8  # of the last words
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # somebody wanted the end of a rank that these killed

_descriptor: int | None = None


def keep(descriptor: int, folder: Path) -> None:
    """From now on this process writes its last words to ``descriptor``; ``folder`` is that of the watchdogs' files."""
    global _descriptor
    _descriptor = descriptor
    faulthandler.enable(file=descriptor, all_threads=False)
    atexit.register(leave)
    usual = sys.excepthook

    def hook(kind, error, trace) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        if LOST_PEER.search(str(error)) and "torch" in text:
            _write(PEER)
            if _appears(Path(f"{folder}{SENTENCE}"), PEER_WAITS):
                return
        else:
            _write(RAISED + text)
        usual(kind, error, trace)

    sys.excepthook = hook


def leave() -> None:
    """This process ends in good order, or as it was asked to: for those that end it without the interpreter's way."""
    if _descriptor is not None and os.fstat(_descriptor).st_size == 0:
        _write(LEFT)


def _write(text: str) -> None:
    if _descriptor is not None:
        os.write(_descriptor, text.encode(errors="replace"))


@dataclass(frozen=True)
class Ended:
    """A rank that has ended. ``stat``: its fields in proc(5) from the state on, just after its end.

    ``out_of_memory``: whether the kernel killed a process of this machine for that just then. ``*_fd``: open file
    descriptors. ``behind_launcher``: whether a launcher speaks when its ranks end; the first rank of a machine has its
    descriptor.
    """

    rank: int
    local_rank: int
    where: str
    stat: list[str]
    out_of_memory: bool
    folder: str
    words_fd: int
    launcher_fd: int | None
    behind_launcher: bool

    def sentence(self) -> list[str]:
        """The sentence and the last lines; empty where the rank left in good order, or only lost a peer."""
        words = os.pread(self.words_fd, 1 << 16, 0).decode(errors="replace")
        how, lines = self._how(words)
        if not how:
            return []
        first = f"rank {self.rank} on {os.uname().nodename} has ended, {self.where}: {how}"
        return [f"{first}. --resume continues from the last checkpoint", *(f"  {line}" for line in lines)]

    def _how(self, words: str) -> tuple[str, list[str]]:
        if "Fatal Python error: " in words:
            lines = words[words.index("Fatal Python error: ") :].splitlines()
            return f"killed by a fault ({lines[0].partition(': ')[2]}), its last calls were", lines[1 : LINES + 1]
        if words.startswith(RAISED):
            lines = words.rstrip().splitlines()
            return lines[-1], lines[-LINES:]
        status = int(self.stat[49]) if self.stat[0] == "Z" else None  # as in wait(2), until the parent has asked for it
        number = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
        if words or number in ASKED or (status is not None and number is None):
            return "", []
        why = "; the kernel killed a process for lack of memory just then" if self.out_of_memory else ""
        return (f"killed by {signal.Signals(number).name}" if number else "it left no word, as after SIGKILL") + why, []


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _claim(path: Path, lines: list[str]) -> bool:
    """Give ``path`` its content at once, unless it exists; whether this process did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def main() -> None:
    """Give the sentence on the rank that the first argument describes, if it is the one to be named."""
    signal.alarm(LIFETIME)
    ended = Ended(**json.loads(sys.argv[1]))
    lines, sentence = ended.sentence(), Path(f"{ended.folder}{SENTENCE}")
    speaks = bool(lines) and _claim(sentence, lines)
    if ended.behind_launcher and ended.local_rank == 0 and ended.launcher_fd is not None:
        poll = select.poll()
        poll.register(ended.launcher_fd, select.POLLIN)
        poll.poll(1000 * LAUNCHER_WAITS)
        speaks = sentence.exists() and _claim(Path(f"{ended.folder}{SPEAKER}"), [])
    elif ended.behind_launcher:
        return
    if speaks:
        print(sentence.read_text(), end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    with suppress(OSError):  # the folder, the terminal or the log is gone
        main()
