"""One run folder: launched, hurt, and recovered as its user would, until it ends as the untouched run did."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from soak.ranks import TICK, ForkedRanks, Launch, Launched
from soak.script import Pace
from soak.world import CONFIG, STEPS, Reference, Variant, can_mount, metrics, mount, state, unmount

PACE = 0.02  # seconds added to every step
START_S = 60.0  # from a launch to its first step, or to its refusal
END_S = 30.0  # until the other ranks have ended after one of them has, once training has begun
LINE = "error: "  # before the one sentence
LOST_PEER = re.compile(r"RuntimeError: .*[Gg]loo|torch.distributed.Dist(Network|Store|Backend)Error: ")


class Failure(Exception):
    """What must not happen: LOST, WRONG, LATE or TRACEBACK, and how it showed."""

    def __init__(self, outcome: str, detail: str):
        super().__init__(outcome, detail)
        self.outcome, self.detail = outcome, detail


class Trial:
    """A run of ``variant`` below ``folder``, on its own copy of the dataset and, where it may mount one, its own disk.

    ``copies``: the content, before the damage, of files that a user could restore; None where there was none.
    ``damaged``: checkpoints that were damaged, with the number of their folder, which a new one of the name has not.
    """

    def __init__(
        self, folder: Path, dataset: Path, variant: Variant, reference: Reference, rng: random.Random, patience: float
    ):
        folder.mkdir()
        self.folder, self.variant, self.reference, self.rng = folder, variant, reference, rng
        self.disk = folder / "disk"
        self.run, self.prefix, self.config = self.disk / "run", folder / "data" / "train", folder / "config.yaml"
        shutil.copytree(dataset.parent, self.prefix.parent)
        self.config.write_text(CONFIG.format(run=self.run, data=self.prefix, steps=STEPS))
        self.patience = patience  # all times within which something must happen are multiplied by it
        self.background = rng.random() < 0.5
        self.self_test = rng.random() < 0.1
        self.launch: Launch | None = None
        self.launches = 0
        self.copies: dict[Path, bytes | None] = {}
        self.damaged: dict[Path, int] = {}
        self.damaged_steps: set[int] = set()  # of metrics.jsonl
        self.ended = False
        self.disk.mkdir()
        self.mounted = can_mount()
        if self.mounted:
            mount(self.disk)

    def close(self) -> None:
        """End what runs and remove everything."""
        if self.launch:
            self.launch.kill()
        if self.mounted:
            unmount(self.disk)
        shutil.rmtree(self.folder, ignore_errors=True)  # a watchdog may outlive its rank for a moment

    # Launching

    def arguments(self, *overrides: str) -> list[str]:
        resume = ["--resume"] if (self.run / "config.yaml").exists() else []
        execution = [f"training.asynchronous_checkpoints={self.background}", f"runtime.self_test={self.self_test}"]
        return ["--config", str(self.config), *resume, *self.variant.overrides(), *execution, *overrides]

    def new_settings(self) -> list[str]:
        """The command line of another training in the same folder."""
        return ["--config", str(self.config), *self.variant.overrides(), "optimizer.lr=5.0e-3"]

    def pace(self, **fields) -> Pace:
        """What a new launch is told; each has files of its own."""
        self.launches += 1
        name = str(self.folder / f"launch-{self.launches}")
        return Pace(PACE, f"{name}.steps", f"{name}.hold", str(self.run), **fields)

    def logs(self) -> Path:
        return self.folder / f"launch-{self.launches}"

    def fork(self, arguments: list[str] | None = None, **fields) -> ForkedRanks:
        pace = self.pace(**fields)
        return ForkedRanks(self.variant.ranks, arguments or self.arguments(), self.logs(), pace)

    def start(self, arguments: list[str] | None = None, **fields) -> Launch:
        """Start the run, or resume it where there is one to resume."""
        self.launch = self.fork(arguments, **fields)
        return self.launch

    def start_launcher(self) -> Launched:
        """The same under DeepSpeed's launcher."""
        pace = self.pace()
        self.launch = Launched(self.variant.ranks, self.arguments(), self.logs(), pace)
        return self.launch

    def at_random_instant(self, steps: int | None = None) -> Launch | None:
        """The launch of the run, somewhere in its steps or, now and then, in its start-up.

        None where the run has come to its end before: a fault then has nothing to hit. ``steps``: begin a launch
        where there is none, and wait for at least this many steps.
        """
        if steps is None and self.rng.random() < 0.2:
            self.stop()
            launch = self.start()
            launch.wait(self.rng.uniform(0.0, 1.0))
        else:
            launch = self.launch or self.start()
            self._await(launch, launch.steps + (steps or self.rng.randint(1, 6)))
            if not launch.over():
                launch.wait(self.rng.uniform(0.0, 3 * PACE))
        if not launch.over():
            return launch
        self.launch = None
        if launch.failed():
            raise Failure("LOST", f"ended by itself: {tail(launch)}")
        self.finish()
        return None

    def wait(self, launch: Launch, seconds: float, steps: int | None = None) -> bool:
        """``launch.wait``, for longer where patience is asked for."""
        return launch.wait(seconds * self.patience, steps)

    def _await(self, launch: Launch, steps: int) -> None:
        if not self.wait(launch, START_S, steps):
            launch.kill()
            raise Failure("LATE", f"no step {steps} of the launch within {START_S:.0f} s: {tail(launch)}")

    def stop(self) -> None:
        """Kill what runs, then check all checkpoints."""
        if self.launch:
            self.launch.kill()
            self.launch = None
        self.audit()

    def stopped_with_checkpoints(self) -> bool:
        """Stop where at least two checkpoints are committed; False where the run has come to its end before."""
        while len(self.sound()) < 2:
            if not self.at_random_instant(steps=4):
                return False
            self.stop()
        self.stop()
        return True

    # Recovering

    def all_end(self, seconds: float = END_S) -> None:
        """Wait until every rank has ended by itself; Failure LATE where one does not.

        In the start-up ranks wait for each other for long: there a launcher ends the others of one that has died.
        """
        launch = self.launch
        if launch.steps == 0:
            self.wait(launch, 1.0)
            if any(code is not None for code in launch.codes.values()):
                launch.kill()
        if not self.wait(launch, seconds):
            ranks = launch.running()
            launch.kill()
            self.launch = None
            raise Failure("LATE", f"{ranks} were there {seconds:.0f} s later: {tail(launch)}")
        self.launch = None
        self.audit()

    def require_saved(self, launch: Launch) -> None:
        """Failure LOST where a launch that was asked to save and leave has not saved the last step of its record."""
        newest = max((step_of(path) for path in self.sound()), default=0)
        last = max((entry["step"] for entry in metrics(self.run)), default=0)
        told = [name for name in ("interrupted", "finished") if (self.run / name).exists()]
        if len(told) != 1 or newest != last or json.loads((self.run / told[0]).read_text())["step"] != newest:
            raise Failure("LOST", f"asked to save step {last}: {told}, newest checkpoint {newest}: {tail(launch)}")

    def recover(self, **fields) -> str:
        """Start again as a user would, and repair what the program asks to repair; returns "equal" or "refused"."""
        if self.progressing(self.start(**fields)):
            return "equal"
        refused = sentence(self.launch)
        self.launch = None
        self.repair()
        if not self.progressing(self.start()):
            again = tail(self.launch)
            raise Failure("LOST", f"refused after the repair: {again}; before it: {refused}")
        return "refused"

    def progressing(self, launch: Launch) -> bool:
        """Whether a launch makes steps, or ends well; Failure LOST where it has gone back behind a sound checkpoint."""
        newest = max((step_of(path) for path in self.sound()), default=0)
        self._await(launch, 2)
        if launch.over() and launch.failed():
            return False
        text = launch.text()
        resumed = re.search(r"resuming after step (\d+)", text)
        if (int(resumed[1]) if resumed else 0) < newest:
            launch.kill()
            raise Failure("LOST", f"step {newest} was committed, but: {tail(launch)}")
        return True

    def progressing_further(self, launch: Launch) -> bool:
        """Whether a launch that was disturbed makes two more steps, or comes to its end."""
        self._await(launch, launch.steps + 2)
        return not (launch.over() and launch.failed())

    def recover_run_file(self, path: Path) -> str:
        """``recover`` after ``path``, a file of the run, was damaged."""
        content = self.copies[path]
        changed = self._changed_steps(path) if path.name == "metrics.jsonl" else set()
        outcome = self.recover()
        if outcome == "equal":
            self.damaged_steps |= changed
            if path.name in ("config.yaml", "data.json"):  # written once: this damage would stay
                path.write_bytes(content)
            self.copies.clear()
        return outcome

    def _changed_steps(self, path: Path) -> set[int]:
        """Steps whose line in the copy of metrics.jsonl is not in the file any more."""
        lines = set(path.read_bytes().splitlines())
        return {
            json.loads(line)["step"] for line in self.copies[path].splitlines() if line not in lines and whole(line)
        }

    def repair(self) -> None:
        """Restore every damaged file of the dataset and the run from its copy."""
        for path, content in self.copies.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        self.copies.clear()

    def copy(self, path: Path) -> None:
        """Keep the content of a file that is about to be damaged."""
        self.copies.setdefault(path, path.read_bytes() if path.exists() else None)

    # Checking

    def committed(self) -> list[Path]:
        """Folders under the names of checkpoints, newest first."""
        found = (self.run / "checkpoints").glob("step-*")
        return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=step_of, reverse=True)

    def sound(self) -> list[Path]:
        """Committed checkpoints that nobody damaged."""
        return [path for path in self.committed() if self.damaged.get(path) != path.stat().st_ino]

    def mark_damaged(self, path: Path) -> None:
        self.damaged[path] = path.stat().st_ino

    def remove_damaged(self) -> None:
        """Remove the checkpoints that were damaged before."""
        for path in set(self.committed()) - set(self.sound()):
            shutil.rmtree(path)

    def audit(self) -> None:
        """Failure WRONG where a sound checkpoint is not, bit for bit, that of the untouched run. Nothing must run."""
        for path in self.sound():
            if state(path) != self.reference.states[step_of(path)]:
                raise Failure("WRONG", f"{path.name} differs from the untouched run's")

    def finish(self) -> None:
        """Failure WRONG where a run that has ended differs from the untouched one."""
        self.audit()
        if not self.sound() or step_of(self.sound()[0]) != STEPS:
            raise Failure("LOST", f"exit code 0, but step {STEPS} is not the newest of {self.committed()}")
        present = metrics(self.run)
        for entry in self.reference.metrics:
            if entry["step"] not in self.damaged_steps and entry not in present:
                others = [other for other in present if other["step"] == entry["step"]]
                raise Failure("WRONG", f"metrics.jsonl has {others} instead of {entry}")
        self.ended = True

    def complete(self) -> None:
        """Let the run come to its end and check it."""
        launch = self.launch or self.start()
        self._await(launch, STEPS + 1)
        self.launch = None
        if launch.failed():
            raise Failure("LOST", f"ended by itself: {tail(launch)}")
        self.finish()


def whole(line: bytes) -> bool:
    """Whether a line of metrics.jsonl was written to its end."""
    return line.startswith(b"{") and line.endswith(b"}")


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def tail(launch: Launch) -> str:
    """The last of what a launch said, and how its ranks ended, on one line."""
    ends = [
        " | ".join(path.read_text(errors="replace").splitlines()[-3:])[-300:] for path in sorted(launch.logs.iterdir())
    ]
    return f"{' || '.join(ends)} {launch.codes}"


def sentence(launch: Launch) -> str:
    """The one sentence of a launch that was refused or ended; Failure TRACEBACK where there is none.

    A rank whose peer has ended with that sentence may show the traceback of the lost connection, and no other.
    """
    logs = [path.read_text(errors="replace") for path in launch.logs.iterdir()]
    crashed = [log for log in logs if "Traceback (most recent call last)" in log and not LOST_PEER.search(log)]
    lines = [line for log in logs for line in log.splitlines() if line.startswith(LINE)]
    path = str(launch.logs.parent)
    if crashed or not any(path in line for line in lines):
        raise Failure("TRACEBACK", tail(launch))
    return lines[0]


def in_child(action: Callable[[], object], seconds: float = 60.0) -> object:
    """The result, through JSON, of ``action`` in a forked process: whatever it loads or breaks stays there.

    Failure TRACEBACK where it raises something else than the errors that the program reports in one sentence; those
    are returned as {"refused": sentence}.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        _answer(action, writer)
    os.close(writer)
    end, status = time.monotonic() + seconds, None
    with os.fdopen(reader, "rb") as pipe:
        os.set_blocking(pipe.fileno(), False)
        content = b""
        while status is None and time.monotonic() < end:
            content += pipe.read() or b""
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = code if ended else None
            time.sleep(TICK if status is None else 0)
        content += pipe.read() or b""
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise Failure("LATE", f"a reader was busy for {seconds:.0f} s")
    if status:
        raise Failure("TRACEBACK", f"status {os.waitstatus_to_exitcode(status)}: {content.decode()[-500:]}")
    return json.loads(content)


def _answer(action: Callable[[], object], writer: int) -> None:
    """Write the result of ``action`` and end this forked process; never returns."""
    from megat2i.checkpoint import CheckpointError
    from megat2i.files import DataFileError

    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a reader skips it says there
        try:
            result = action()
        except (CheckpointError, DataFileError) as error:
            result = {"refused": str(error)}
        os.write(writer, json.dumps(result).encode())
        code = 0
    except BaseException as error:
        os.write(writer, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(code)
