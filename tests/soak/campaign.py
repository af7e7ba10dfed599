"""The campaign: rounds of a few faults, each decided by the seed and its number, several at a time."""

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from soak.faults import KINDS, Kind
from soak.ranks import TICK, ForkedRanks
from soak.script import Pace
from soak.trial import Failure, Trial, tail
from soak.world import (
    CONFIG,
    STEPS,
    VARIANTS,
    Reference,
    Variant,
    generator,
    make_dataset,
    metrics,
    other_tokens,
    state,
)

PER_ROUND = 8  # faults
ATTEMPTS = 5  # to hit a run before its end
ROUND_S = 900.0  # no round takes so long: each wait in it has its own bound
WEIGHTS = (6, 6, 5, 2, 3, 3, 2, 2, 1)  # how often each of VARIANTS is drawn


def deck(seed: int, kinds: list[Kind]) -> Iterator[Kind]:
    """Kinds of faults without end: first each of them once, then each by its weight, shuffled by the seed."""
    rng = generator(seed, "deck")
    yield from rng.sample(kinds, len(kinds))
    while True:
        weighted = [kind for kind in kinds for _ in range(kind.weight)]
        yield from rng.sample(weighted, len(weighted))


@dataclass(frozen=True)
class Campaign:
    """``folder``: scratch; ``variants``: how many of VARIANTS take part; ``patience``: see Trial."""

    folder: Path
    seed: int
    kinds: list[Kind]
    variants: int
    patience: float

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset" / "train"

    def reference_folder(self, variant: Variant) -> Path:
        return self.folder / f"reference-{variant.name}"

    def make_reference(self, variant: Variant) -> None:
        """Run ``variant`` untouched and remember its states and metrics; and begin another run, for parts of it."""
        folder = self.reference_folder(variant)
        folder.mkdir()
        self._untouched(variant, folder, "run", "training.checkpoint_every=1", "training.keep_checkpoints=1000")
        run, donor = folder / "run", folder / "donor"
        states = {path.name.removeprefix("step-"): state(path) for path in (run / "checkpoints").glob("step-*")}
        content = {"states": states, "metrics": metrics(run)}
        shutil.rmtree(run, ignore_errors=True)  # a watchdog may outlive its rank for a moment
        self._untouched(variant, folder, "other", "training.stop_at=4", "optimizer.lr=5.0e-3")
        (folder / "other" / "checkpoints").rename(donor)
        (donor / "train.bin").write_bytes(other_tokens(self.dataset))
        (folder / "reference.json").write_text(json.dumps(content))

    def _untouched(self, variant: Variant, folder: Path, name: str, *overrides: str) -> None:
        config = folder / f"{name}.yaml"
        config.write_text(CONFIG.format(run=folder / name, data=self.dataset, steps=STEPS))
        pace = Pace(0.0, str(folder / f"{name}.steps"), str(folder / "hold"), str(folder))
        arguments = ["--config", str(config), *variant.overrides(), "runtime.self_test=false", *overrides]
        launch = ForkedRanks(variant.ranks, arguments, folder / f"{name}.logs", pace)
        if not launch.wait(120 * self.patience) or launch.failed():
            launch.kill()
            raise RuntimeError(f"the untouched run of {variant.name} has failed: {tail(launch)}")

    def round(self, number: int) -> list[dict]:
        """Carry out the faults of one round; returns a record of each that was injected."""
        rng, dealt = generator(self.seed, number), deck(self.seed, self.kinds)
        faults = [next(dealt) for _ in range((number + 1) * PER_ROUND)][-PER_ROUND:]
        records: list[dict] = []
        folders = (self.folder / f"round-{number}-{trial}" for trial in range(1000))
        trial, since = None, 0
        try:
            for index, kind in enumerate(faults):
                for _ in range(ATTEMPTS):
                    if trial is None or trial.ended:
                        if trial:
                            trial.close()
                        trial, since = self._trial(next(folders), rng), len(records)
                    name = f"{number}.{index}"
                    record = self._inject(trial, kind, name)
                    if record:
                        records.append(record)
                    if record is None or "text" in record:
                        trial.close()
                        trial = None
                    if record:
                        break
            if trial and not trial.ended:
                self._complete(trial, records[since:])
        finally:
            if trial:
                trial.close()
        return records

    def _trial(self, folder: Path, rng) -> Trial:
        variant = rng.choices(VARIANTS[: self.variants], WEIGHTS[: self.variants])[0]
        return Trial(folder, self.dataset, variant, Reference.read(self.reference_folder(variant)), rng, self.patience)

    def _inject(self, trial: Trial, kind: Kind, name: str) -> dict | None:
        """The record of one fault; None where it hit nothing. With the key "text" where it has failed."""
        common = {"fault": name, "kind": kind.name, "variant": trial.variant.name, "background": trial.background}
        try:
            result = kind.fault(trial)
        except Failure as failure:
            return common | {
                "outcome": failure.outcome,
                "detail": "",
                "seconds": None,
                "trained": True,
                "text": failure.detail,
            }
        return common | vars(result) if result else None

    def _complete(self, trial: Trial, records: list[dict]) -> None:
        """Let the run end; where it ends otherwise than the untouched one, every fault that hit it has failed."""
        try:
            trial.complete()
        except Failure as failure:
            for record in records:
                record |= {"outcome": failure.outcome, "text": f"at the end of the run: {failure.detail}"}


def in_parallel(
    jobs: int, tasks: Iterator[tuple[str, Callable[[], object]]], folder: Path
) -> Iterator[tuple[str, object]]:
    """Results of named tasks as they end, ``jobs`` at a time, each in a process forked from this one.

    A task's result travels as JSON. RuntimeError where a task raises: that is a mistake of the campaign itself.
    """
    running: dict[int, tuple[str, float]] = {}
    try:
        while True:
            while len(running) < jobs and (task := next(tasks, None)):
                running[_fork(*task, folder)] = (task[0], time.monotonic())
            if not running:
                return
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                name, _ = running.pop(pid)
                content = (folder / f"{name}.json").read_text() if status == 0 else None
                if content is None:
                    raise RuntimeError(f"{name} of the campaign has failed with status {status}")
                yield name, json.loads(content)
            late = [name for name, started in running.values() if time.monotonic() - started > ROUND_S]
            if late:
                raise RuntimeError(f"{late} of the campaign have not ended")
            time.sleep(5 * TICK)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        for pid in running:
            os.waitpid(pid, 0)


def _fork(name: str, task: Callable[[], object], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through every ``finally``
        (folder / f"{name}.json").write_text(json.dumps(task()))
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def rounds(campaign: Campaign, numbers: Iterator[int], seconds: float) -> Iterator[tuple[str, Callable[[], object]]]:
    """Tasks of the rounds ``numbers``; none is begun after ``seconds``."""
    end = time.monotonic() + seconds
    for number in numbers:
        if time.monotonic() > end:
            return
        yield f"round-{number}", lambda number=number: campaign.round(number)


def prepare(campaign: Campaign, jobs: int) -> None:
    """Make the dataset and the untouched run of every variant."""
    make_dataset(campaign.dataset)
    variants = VARIANTS[: campaign.variants]
    tasks = ((f"reference-{v.name}", lambda v=v: campaign.make_reference(v)) for v in variants)
    for _ in in_parallel(jobs, tasks, campaign.folder):
        pass


def available(report: Callable[[str], None]) -> list[Kind]:
    """The kinds of faults that can be had on this machine; ``report`` is told of the others."""
    kinds = []
    for kind in KINDS:
        if missing := kind.needs():
            report(f"skipped: {kind.name} ({missing})")
        else:
            kinds.append(kind)
    return kinds
