"""The watchdog of one rank: a process beside it that notices when all ranks stand still, and names the one at fault.

It reads the marks of its rank (``progress_marks``) in shared memory and needs the standard library alone, so that it
starts at once and stays small. A launch hangs when no rank has made progress for ``runtime.watchdog_s``. The watchdogs
agree on that through files in the run folder, which they write only while some rank stands still. Then one of them says
which rank is at fault, and each ends its own.
"""

import json
import mmap
import os
import re
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
DUMP_SIGNAL = signal.SIGRTMAX - 1  # makes a rank write the stacks of its threads
START = (
    "starting",
    "joining the other ranks",
    "self-test",
    "opening the data",
    "checking the checkpoints",
    "making the model",
    "loading the checkpoint",
)
STEP = (
    "reading data",
    "forward and backward",
    "optimizer step",
    "measuring the held-out loss",
    "drawing samples",
    "writing a checkpoint",
    "ending",
)
PHASES = START + STEP  # in the order in which every rank goes through them
# In these a single call may move gigabytes: there the bytes that a process reads and writes are progress too.
MOVES_FILES = ("checking the checkpoints", "making the model", "loading the checkpoint", "writing a checkpoint")

# The memory that a rank shares with its watchdog: marks so far, step, phase; ticks of a thread; an order to the rank,
# which is HOLD or the exit code to end with.
MARK, NUMBER = struct.Struct("<QQQ"), struct.Struct("<Q")
TICKS_AT, ORDER_AT, RECORD_BYTES = 24, 32, 40
HOLD = 1  # an error that meets the main thread from now on comes from ranks that were ended, and is no news

LONGEST_LOOK = 2.0  # seconds that count between two looks: while this process was stopped too, its rank may have been
DUMP_TIME = 1.0  # seconds for a rank to write its stacks
GRACE = 3.0  # seconds for a rank to end by itself
LAST_WORD = 10.0  # seconds to wait for the launcher's words
STACKS, FRAMES = 2, 16  # ranks whose stacks are printed, and lines of each
FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


def look_interval(limit: float) -> float:
    """Seconds between two ticks of a rank, and between two looks at it."""
    return min(1.0, limit / 8)


@dataclass(frozen=True)
class Settings:
    """What a rank tells its watchdog. ``limit``: seconds without progress; ``*_fd``: open file descriptors."""

    rank: int
    local_rank: int
    world_size: int
    pid: int
    main_thread: int
    limit: float
    folder: str  # of the watchdogs' files
    process_fd: int
    record_fd: int
    stacks_fd: int
    launcher_fd: int | None


@dataclass(frozen=True)
class Answer:
    """What a watchdog tells the others of its rank. ``stack``: of the main thread, the innermost call first."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    stalled: bool  # no progress for the limit
    ticking: bool  # its Python threads run
    state: str  # of the process, as /proc has it
    stack: list[str] | None = None

    @property
    def where(self) -> str:
        return position(self.step, self.phase)

    @property
    def silent(self) -> bool:
        """Whether the process does not run at all."""
        return self.state in "TtDZX" or not self.ticking

    @property
    def call(self) -> str:
        """The innermost call of this project, else of any code."""
        frames = [match for match in map(FRAME.fullmatch, self.stack or ()) if match]
        frames = [match for match in frames if "megat2i" in match[1]] or frames
        if not frames:
            return "no Python stack"
        file, line, function = frames[0].groups()
        return f"{Path(file).name}:{line} in {function}"


def position(step: int, phase: str) -> str:
    return f"step {step:,}, {phase}" if step else f"before the first step, {phase}"


class Unchanged:
    """For how many seconds a value has not changed, as far as this process was awake."""

    def __init__(self):
        self.seconds = 0.0
        self._value, self._looked = None, time.monotonic()

    def look(self, value: object) -> float:
        now = time.monotonic()
        self.seconds = self.seconds + min(now - self._looked, LONGEST_LOOK) if value == self._value else 0.0
        self._value, self._looked = value, now
        return self.seconds


class Rank:
    """The process that is watched."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._record = mmap.mmap(settings.record_fd, RECORD_BYTES)
        self._progress, self._ticks = Unchanged(), Unchanged()

    def ended(self, seconds: float) -> bool:
        """Whether the process has ended, or does within ``seconds``."""
        return has_ended(self.settings.process_fd, seconds)

    def look(self) -> Answer:
        """How the rank is now."""
        marks, step, number = MARK.unpack_from(self._record, 0)
        phase, limit = PHASES[number], self.settings.limit
        moved = self._megabytes() if phase in MOVES_FILES else 0
        ticks = self._ticks.look(NUMBER.unpack_from(self._record, TICKS_AT))
        return Answer(
            rank=self.settings.rank,
            host=os.uname().nodename,
            pid=self.settings.pid,
            step=step,
            phase=phase,
            stalled=self._progress.look((marks, moved)) >= limit,
            ticking=ticks < limit / 2,
            state=self._state(),
        )

    def stack(self, state: str) -> list[str]:
        """The calls of the main thread, the innermost first; none where the process does not answer."""
        stacks = self.settings.stacks_fd
        before = os.fstat(stacks).st_size
        self._signal(DUMP_SIGNAL)
        if state == "T":  # the signal that waits is taken before anything else
            self._signal(signal.SIGCONT)
        size, deadline = before, time.monotonic() + DUMP_TIME
        while time.monotonic() < deadline:
            time.sleep(0.05)
            last, size = size, os.fstat(stacks).st_size
            if before < last == size:
                break
        return main_stack(os.pread(stacks, size - before, before).decode(errors="replace"), self.settings.main_thread)

    def hold(self) -> None:
        """Keep the rank from ending by itself when others do."""
        NUMBER.pack_into(self._record, ORDER_AT, HOLD)

    def end(self) -> None:
        """Let the rank end with EXIT_CODE; kill it where it cannot."""
        NUMBER.pack_into(self._record, ORDER_AT, EXIT_CODE)
        if not self.ended(GRACE):
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.settings.process_fd, number)

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.settings.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "X"

    def _megabytes(self) -> int:
        try:
            lines = Path(f"/proc/{self.settings.pid}/io").read_text().splitlines()[:6]
        except OSError:  # a system that hides it
            return 0
        return sum(int(line.split()[1]) for line in lines if "char" in line or "bytes" in line) >> 20


def has_ended(process_fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(process_fd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def main_stack(text: str, thread: int) -> list[str]:
    """The lines of one thread in what faulthandler wrote."""
    lines, inside = [], False
    for line in text.splitlines():
        header = re.match(r"(?:Current thread|Thread) 0x([0-9a-f]+)", line)
        if header:
            inside = int(header[1], 16) == thread
        elif inside and line.strip():
            lines.append(line)
    return lines


class Watch:
    """Looks at one rank, asks the other watchdogs where it stands still, and acts on what they agree on."""

    def __init__(self, settings: Settings):
        self.settings, self.rank = settings, Rank(settings)
        self.folder = Path(settings.folder)
        self.verdict = self.folder / "verdict.txt"
        self.concluding = False
        self.asking: object | None = None  # the same from the first failed or unfinished use of the folder on
        self._answered = False
        self._lacking = Unchanged()
        self._summary: str | None = None

    def run(self) -> None:
        """Look at the rank until all ranks stand still; run in a thread, which a file system that hangs may block."""
        self._ask(self._clear)
        answered = time.monotonic()
        while self._summary is None:
            time.sleep(look_interval(self.settings.limit))
            answer = self.rank.look()
            if time.monotonic() - answered < self.settings.limit / 8:
                continue
            answered = time.monotonic()
            if answer.stalled or self._ask(self.folder.exists):
                self._ask(lambda answer=answer: self._consult(answer))

    def conclude_alone(self) -> None:
        """Name this rank where it stands still and the folder does not answer."""
        answer = self.rank.look()
        if answer.stalled and self._summary is None:
            self.concluding = True
            answer = replace(answer, stack=self.rank.stack(answer.state))
            self._say([f"watchdog: {self.folder} does not answer, so nothing is known of the other ranks"])
            self._say_and_end(report([answer], replace(self.settings, world_size=1)))

    def last_word(self) -> None:
        """Say it again behind the words of the launcher, which knows only that its ranks ended."""
        if self._summary and self.settings.local_rank == 0 and self.settings.launcher_fd is not None:
            has_ended(self.settings.launcher_fd, LAST_WORD)
            self._say([self._summary])

    def withdraw(self) -> None:
        """Remove the answer, if there is one."""
        if self._answered:
            self._file(self.settings.rank).unlink(missing_ok=True)
            self._remove_folders()
        self._answered = False

    def _ask(self, action: Callable[[], bool | None]) -> bool | None:
        """Do something in the folder; the main thread sees for how long that fails or takes."""
        self.asking = self.asking or object()
        try:
            result = action()
        except OSError:
            self.concluding = False
            return None
        self.asking = None
        return result

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _clear(self) -> None:
        """Remove what an earlier launch left."""
        files = [self._file(self.settings.rank), self.verdict]
        if self.settings.rank == 0:
            files += self.folder.glob("rank-*")
        for file in files:
            file.unlink(missing_ok=True)
        self._remove_folders()

    def _remove_folders(self) -> None:
        with suppress(OSError):  # another launch, or another rank, has files there
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def _consult(self, answer: Answer) -> None:
        """Tell the others how this rank is; conclude where all of them stand still."""
        self._write(answer)
        if self.verdict.exists():
            self._conclude(answer)
            return
        answers = self._answers()
        stalled = [other.stalled for other in answers.values()]
        if not any(stalled):
            self.withdraw()
        # Those that do not answer may be late, or gone.
        lacking = self._lacking.look(tuple(answers) if all(stalled) else object())
        if all(stalled) and (len(answers) == self.settings.world_size or lacking >= self.settings.limit / 2):
            self._conclude(answer)

    def _write(self, answer: Answer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._answered = True
        write(self._file(answer.rank), json.dumps(asdict(answer)))

    def _answers(self) -> dict[int, Answer]:
        """What the watchdogs say now, by rank. Times are those of the file system, which all of them share."""
        answers, times = {}, {}
        for rank in range(self.settings.world_size):
            with suppress(FileNotFoundError), open(self._file(rank)) as file:
                answers[rank], times[rank] = Answer(**json.load(file)), os.fstat(file.fileno()).st_mtime
        now = times.get(self.settings.rank, time.time())
        return {rank: answer for rank, answer in answers.items() if now - times[rank] <= self.settings.limit / 2}

    def _conclude(self, answer: Answer) -> None:
        """All ranks stand still: one watchdog says who is at fault, and every one ends its rank."""
        self.concluding = True
        self.rank.hold()
        try:
            self.verdict.touch(exist_ok=False)
            speaks = True
        except FileExistsError:
            speaks = False
        if answer.state == "T":  # its stack is had by letting it go on, and then the others go on too
            self._wait(lambda: all(other.stack is not None or other.state == "T" for other in self._answers().values()))
        stack = self.rank.stack(answer.state)
        time.sleep(2 * look_interval(self.settings.limit))  # until the rank holds, before any other is ended
        self._write(replace(answer, stack=stack))
        if speaks:
            self._wait(lambda: all(other.stack is not None for other in self._answers().values()))
            lines = report(list(self._answers().values()), self.settings)
            write(self.verdict, "\n".join(lines) + "\n")
            self._say_and_end(lines)
        else:
            self._wait(lambda: self.verdict.stat().st_size > 0, rounds=3)
            self._end(self.verdict.read_text().partition("\n")[0])

    def _wait(self, condition: Callable[[], bool], rounds: int = 1) -> None:
        deadline = time.monotonic() + rounds * max(self.settings.limit / 8, 2 * DUMP_TIME)
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _say_and_end(self, lines: list[str]) -> None:
        self._say(lines)
        self._end(lines[0])

    def _end(self, summary: str) -> None:
        self._summary = summary
        self.rank.end()

    @staticmethod
    def _say(lines: list[str]) -> None:
        with suppress(OSError):  # the terminal or the log is gone
            print("\n".join(lines), file=sys.stderr, flush=True)


def write(path: Path, text: str) -> None:
    """Give a file its content at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def report(answers: list[Answer], settings: Settings) -> list[str]:
    """The lines to print: in the first who is at fault, then the stacks of those, and where the others are."""
    blamed, sentence = blame(answers, settings.world_size)
    lines = [
        f"watchdog: {sentence}. No rank made progress for {settings.limit:g} s, so the job ends with exit code "
        f"{EXIT_CODE}; --resume continues from the last checkpoint"
    ]
    for answer in blamed[:STACKS]:
        lines.append(f"rank {answer.rank}, process {answer.pid} on {answer.host}, {answer.where}:")
        lines += answer.stack[:FRAMES] if answer.stack else ["  it does not write its Python stack"]
    groups: dict[str, list[int]] = {}
    for answer in answers:
        if answer not in blamed[:STACKS]:
            groups.setdefault(f"{answer.where}, at {answer.call}", []).append(answer.rank)
    lines += [f"{ranks_in_words(ranks)}: {where}" for where, ranks in groups.items()]
    return [*lines, f"the stacks of all ranks are in {settings.folder}"]


def blame(answers: list[Answer], world_size: int) -> tuple[list[Answer], str]:
    """The ranks at fault, as far as they answer, and the sentence on them."""
    absent = sorted(set(range(world_size)) - {answer.rank for answer in answers}) if world_size > 1 else []
    if absent:
        joining = any(answer.phase in START[:2] for answer in answers)
        one = len(absent) == 1
        answer, subject = ("does not answer", "it") if one else ("do not answer", "they")
        why = "never started" if joining else "has ended" if one else "have ended"
        return [], f"{ranks_in_words(absent)} {answer}: {subject} {why}"
    blamed = at_fault(answers)
    if not blamed:
        return [], f"all {len(answers)} ranks stand still, and none stands out"
    who, hosts = ranks_in_words([answer.rank for answer in blamed]), sorted({answer.host for answer in blamed})
    stands = "stands" if len(blamed) == 1 else "stand"
    return blamed, f"{who} on {', '.join(hosts)} {stands} still, {blamed[0].where}: {condition(blamed[0])}"


def at_fault(answers: list[Answer]) -> list[Answer]:
    """Those that the others wait for, as far as it shows; none where all look alike."""
    silent = [answer for answer in answers if answer.silent]
    if silent:
        return silent
    order = [(answer.step, PHASES.index(answer.phase)) for answer in answers]
    last = [answer for answer, place in zip(answers, order, strict=True) if place == min(order)]
    if len(last) < len(answers) or len(answers) == 1:
        return last
    busy = [answer for answer in answers if not any("torch/distributed" in line for line in answer.stack or ())]
    return busy if len(busy) < len(answers) else []


def condition(answer: Answer) -> str:
    """What keeps the process from going on, in words."""
    if answer.state in "Tt":
        return "stopped by a signal" if answer.state == "T" else "stopped by a debugger"
    if answer.state == "D":
        return "its process waits for a disk or a device"
    if answer.state in "ZX":
        return "its process has ended"
    return f"at {answer.call}" if answer.ticking else "its Python threads do not run"


def ranks_in_words(ranks: list[int]) -> str:
    """Such as "rank 3" or "ranks 0, 2-5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def main() -> None:
    """Watch the rank that the first argument describes, until it ends."""
    if os.fork():  # no child of its rank: a launcher that ends the tree of a rank must not wait for its watchdog
        os._exit(0)
    # It ends with its rank, whatever is sent to all processes of a launch.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    watch = Watch(Settings(**json.loads(sys.argv[1])))
    thread, blocked = threading.Thread(target=watch.run, daemon=True), Unchanged()
    thread.start()
    while not watch.rank.ended(look_interval(watch.settings.limit)):
        patience = max(watch.settings.limit, LAST_WORD) if watch.concluding else watch.settings.limit / 2
        if blocked.look(watch.asking or object()) >= patience:
            watch.conclude_alone()
    if watch.concluding:  # perhaps the rank of a watchdog that was quicker to end its own took this one along
        thread.join(LAST_WORD)
    else:
        with suppress(OSError):
            watch.withdraw()
    watch.last_word()
    os._exit(0)  # not waiting for a thread in a file system that hangs


if __name__ == "__main__":
    main()
