"""How a run stands, by the files of its folder alone: nothing is written, and damaged files are named, not fatal.

Needs neither PyTorch nor the machine that trains, so that it answers at once on a login node.
"""

import json
import os
import statistics
import time
from collections import deque
from pathlib import Path

import yaml

from megat2i.files import DataFileError, read_json_object, step_of
from megat2i.processes import Process
from megat2i.run_owner import FOLDER, HEARTBEAT_S, RELEASED, Owner, heartbeat, holder, last_owner

RECENT = 50  # steps whose mean is the training loss
STILL_S = 30.0  # without a step, at least, before a run stands still
STILL_STEPS = 20  # usual times of a step before a run stands still
MODALITIES = ("text", "image")
RESTORE = "Restore it from a copy; nothing else of the screen depends on it"


class Metrics:
    """The records of ``metrics.jsonl``, read on from where the last ``update`` ended."""

    def __init__(self, path: Path):
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.damaged = self.skipped = self.spikes = self.rewinds = 0
        self.last: dict = {}
        self.held_out: dict[str, dict] = {}
        self.recent: deque[dict] = deque(maxlen=RECENT)
        self._offset, self._file = 0, None

    def update(self) -> None:
        """Take what was added. A file that was replaced, as a resumed run does, is read from its beginning."""
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._file or status.st_size < self._offset:
                self._begin()
                self._file = identity
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # is being written
                    break
                self._offset += len(line)
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            split, step = entry.get("split"), entry["step"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            self.damaged += 1
            return
        if not isinstance(step, int) or not isinstance(split, str | None):
            self.damaged += 1
        elif split is not None:
            self.held_out[split] = entry
        else:
            self.last = entry
            self.recent.append(entry)
            self.skipped += entry.get("skipped") == 1
            self.spikes += entry.get("spike") == 1
            self.rewinds += "rewound_from" in entry

    def mean(self, key: str) -> float | None:
        """Of the recent steps that have a number under ``key``."""
        values = [entry[key] for entry in self.recent if isinstance(entry.get(key), int | float)]
        return sum(values) / len(values) if values else None

    @property
    def usual_step_s(self) -> float | None:
        values = [entry["step_s"] for entry in self.recent if isinstance(entry.get("step_s"), int | float)]
        return statistics.median(values) if values else None


class RunStatus:
    """Looks at the run in ``run_dir``, as often as ``look`` is called. Raises DataFileError where it is no run."""

    def __init__(self, run_dir: Path):
        self.run_dir, self._metrics = run_dir, Metrics(run_dir / "metrics.jsonl")
        if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "environment.json", FOLDER)):
            raise DataFileError(run_dir, "holds no run", "Give the folder that run.dir names")

    def look(self) -> dict:
        """What ``tools/status.py --json`` prints; its help lists the keys."""
        self._problems: list[str] = []
        self._now, metrics = time.time(), self._metrics
        try:
            metrics.update()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._problems.append(f"{metrics.path}: not readable ({error.strerror})")
        if metrics.damaged:
            self._problems.append(f"{metrics.path}: {metrics.damaged} damaged lines are left out")
        environment = self._object("environment.json")
        training = _mapping(self._settings().get("training"))
        step, steps = metrics.last.get("step", 0), _number(training.get("steps"))
        stop_at = _number(
            _mapping(environment.get("changed_settings")).get("training.stop_at", training.get("stop_at"))
        )
        checkpoint = self._checkpoint()
        if not metrics.last and checkpoint:
            step = checkpoint["step"]
        owner, alive = self._owner()
        health = self._health(owner, alive, step, steps, stop_at)
        left = self._time_left(step, stop_at or steps, environment) if alive else None
        earlier = environment.get("earlier")
        return {
            "run": str(self.run_dir),
            "health": health,
            "step": step,
            "steps": steps,
            "stop_at": stop_at,
            "last_step_age_s": self._age("metrics.jsonl"),
            "time_left_s": left,
            "job": self._job(environment),
            "step_s": metrics.usual_step_s,
            "tokens_per_s": metrics.mean("tokens_per_s"),
            "mfu": metrics.mean("mfu"),
            "training_loss": {m: loss for m in MODALITIES if (loss := metrics.mean(f"loss/{m}")) is not None},
            "held_out": {split: {"step": e["step"]} | _losses(e) for split, e in metrics.held_out.items()},
            "checkpoint": checkpoint,
            "slowest_rank": self._slowest_rank(),
            "skipped": metrics.skipped,
            "spikes": metrics.spikes,
            "rewinds": metrics.rewinds,
            "restarts": len(earlier) if isinstance(earlier, list) else 0,
            "resumed_from": environment.get("resumed_from"),
            "backend": environment.get("backend"),
            "layout": environment.get("layout"),
            "problems": self._problems,
        }

    def _object(self, name: str) -> dict:
        """The JSON object in a file of the run; {} where there is none, and where it is damaged, which is noted."""
        path = self.run_dir / name
        try:
            return read_json_object(path, RESTORE) if path.exists() else {}
        except DataFileError as error:
            self._problems.append(str(error))
            return {}

    def _settings(self) -> dict:
        path = self.run_dir / "config.yaml"
        try:
            settings = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else "not readable as YAML"
            self._problems.append(f"{path}: {reason}, so the length of the schedule is not known")
            return {}
        return _mapping(settings)

    def _age(self, name: str) -> float | None:
        """Seconds since a file was changed; never negative, since clocks of machines differ."""
        try:
            return max(0.0, self._now - (self.run_dir / name).stat().st_mtime)
        except OSError:
            return None

    def _checkpoint(self) -> dict | None:
        """The newest committed checkpoint. Its digests are not verified: that reads all of it."""
        folder = self.run_dir / "checkpoints"
        steps = {step_of(path.name): path for path in folder.glob("step-*") if (path / "manifest.json").exists()}
        steps.pop(None, None)
        if not steps:
            return None
        newest = steps[max(steps)]
        try:
            size = sum(file.stat().st_size for file in newest.iterdir())
            age = max(0.0, self._now - (newest / "manifest.json").stat().st_mtime)
        except OSError:  # it was removed just now
            return None
        return {"step": max(steps), "path": str(newest), "age_s": age, "bytes": size, "number": len(steps)}

    def _job(self, environment: dict) -> dict | None:
        """The job that trains, and when it ends, as its script renews it; None where the file is of another job."""
        if not (self.run_dir / "triggers" / "job_end").exists():
            return None
        job = self._object("triggers/job_end")
        end = _number(job.get("end"))
        slurm = environment.get("slurm")
        other = isinstance(slurm, dict) and slurm.get("job") != job.get("job")
        return {"job": job.get("job"), "left_s": end - self._now} if end is not None and not other else None

    def _slowest_rank(self) -> dict | None:
        """The last measurement of this launch."""
        path, began = self.run_dir / "slowest_rank.json", self._age("environment.json")
        measured = self._object(path.name)
        age = self._age(path.name)
        return measured if measured and (began is None or age is None or age <= began) else None

    def _time_left(self, step: int, last: int | None, environment: dict) -> float | None:
        """Seconds to the end of the schedule at the pace of this launch, validations and checkpoints included."""
        usual, began, ended = self._metrics.usual_step_s, self._age("environment.json"), self._age("metrics.jsonl")
        if not usual or last is None:
            return None
        resumed = step_of(Path(str(environment.get("resumed_from"))).name) or 0
        paced = (began - ended) / (step - resumed) if began is not None and ended is not None and step > resumed else 0
        return max(0, last - step) * max(paced, usual)

    def _owner(self) -> tuple[Owner | None, bool | None]:
        """The last launch, and whether it lives; None where the folder does not tell, as before there were locks."""
        try:
            _, path = last_owner(self.run_dir / FOLDER)
            if path is None:
                return None, None
            owner = Owner.read(path)
            return owner, path.suffix != RELEASED and _lives(path, owner)
        except OSError:  # released while it was looked at
            return None, None

    def _health(self, owner: Owner | None, alive: bool | None, step: int, steps: int | None, stop: int | None) -> dict:
        state, detail = self._alive() if alive else self._ended(alive, step, steps, stop)
        health = {"state": state, "detail": detail}
        return health | ({"host": owner.host, "process": owner.pid, "since": owner.since} if owner else {})

    def _alive(self) -> tuple[str, str]:
        age, began, usual = self._age("metrics.jsonl"), self._age("environment.json"), self._metrics.usual_step_s
        verdict = self._said("*/verdict.txt", began)
        if verdict:
            return "standing still", verdict
        if age is None or not self._metrics.last or (began is not None and began < age):
            return "starting", "no step of this launch yet"
        pace = f"usually one every {usual:.2g} s" if usual else "the first ones"
        if age <= max(STILL_S, STILL_STEPS * (usual or 0)):
            return "alive", f"last step {_ago(age)}, {pace}"
        if any((self.run_dir / "checkpoints").glob("step-*.writing")):
            return "alive", f"writing a checkpoint; last step {_ago(age)}"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._now - age))
        return "standing still", f"no step since {since} ({_ago(age)}), {pace}; a validation may take so long"

    def _ended(self, alive: bool | None, step: int, steps: int | None, stop_at: int | None) -> tuple[str, str]:
        finished, interrupted = (self.run_dir / name for name in ("finished", "interrupted"))
        if finished.exists() or (steps is not None and step >= steps):
            return "finished", f"after step {self._object('finished').get('step', step)}"
        if interrupted.exists():
            record = self._object("interrupted")
            return "interrupted", f"by {record.get('reason')} after step {record.get('step')}; --resume continues"
        if stop_at is not None and step >= stop_at:
            return "stopped", f"at training.stop_at; --resume training.stop_at=null continues to step {steps}"
        age = self._age("metrics.jsonl")
        last = "no step was done" if age is None else f"last step {_ago(age)}"
        if alive is None:
            return "unknown", f"the folder has no lock, as runs of older versions; {last}"
        began = self._age("environment.json")
        why = self._said("*-ended.txt", began) or self._said("*/verdict.txt", began)
        return "dead", why or f"its processes have ended without a word; {last}; --resume continues"

    def _said(self, pattern: str, began: float | None) -> str | None:
        """The first line of what the watchdogs of this launch wrote, the newest first; ``began`` seconds ago."""
        for path in sorted(self.run_dir.glob(f"hang/{pattern}")):
            try:
                age, lines = self._now - path.stat().st_mtime, path.read_text(errors="replace").splitlines()
            except OSError:
                continue
            if lines and (began is None or age <= began):
                return lines[0]
        return None


def _lives(path: Path, owner: Owner | None) -> bool:
    """Whether the launch whose owner is in ``path`` lives, as ``run_lock`` has it; another machine's by its heartbeat.

    Raises FileNotFoundError where it was released meanwhile.
    """
    here = Owner.here()
    same_kernel = owner is not None and owner.boot == here.boot != ""
    same_numbers = same_kernel and owner.namespace == here.namespace
    if same_numbers and Process(owner.pid, owner.started).alive:
        return True
    process = holder(path)
    if process or (same_kernel and (same_numbers or process is not None)):
        return bool(process)
    before = heartbeat(path)
    if abs(time.time() - before / 1e9) <= 2 * HEARTBEAT_S:
        return True
    deadline = time.monotonic() + 2 * HEARTBEAT_S  # clocks differ: only that it changes tells
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if heartbeat(path) != before:
            return True
    return False


def _losses(entry: dict) -> dict:
    losses = {modality: entry.get(f"loss/{modality}") for modality in MODALITIES}
    return {modality: loss for modality, loss in losses.items() if loss is not None}


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """Such as "3 s", "2:05" or "1 day 4:00:00"."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}" if whole >= 3600 else f"{rest // 60}:{rest % 60:02}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock
