"""What finished runs say of themselves: curves and last values, from ``metrics.jsonl`` alone."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from megat2i import config

EMA = 0.95  # smoothing of plotted curves, as the paper's
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95% quantile of Student's t for n samples


class MissingRun(RuntimeError):
    """A figure needs a run that is not there or not finished."""


@dataclass(frozen=True)
class Record:
    """The lines of a run: of ``training`` steps, and those of each validation ``split``."""

    name: str
    training: list[dict]
    splits: dict[str, list[dict]]

    @staticmethod
    def read(run_dir: Path) -> "Record":
        """Raises MissingRun, also where the run has not reached its last step."""
        path = run_dir / "metrics.jsonl"
        if not path.exists():
            raise MissingRun(f"{path} is absent: run this experiment first")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        splits: dict[str, list[dict]] = {}
        for line in lines:
            if "split" in line:
                splits.setdefault(line["split"], []).append(line)
        training = [line for line in lines if "split" not in line]
        steps, reached = config.load(run_dir / "config.yaml").training.steps, training[-1]["step"] if training else 0
        if reached < steps:
            raise MissingRun(f"{path} ends at step {reached:,} of {steps:,}: run this experiment to its end")
        return Record(run_dir.name, training, splits)

    def tokens(self) -> list[int]:
        """Tokens that the run has trained on up to each step: labels of all modalities."""
        total, result = 0, []
        for line in self.training:
            total += sum(line[f"tokens/{modality}"] for modality in ("text", "image", "special"))
            result.append(total)
        return result

    def curve(self, key: str) -> list[float]:
        """A key of every step, smoothed by an exponential moving average without the bias of its start."""
        average, weight, result = 0.0, 0.0, []
        for line in self.training:
            average = EMA * average + (1 - EMA) * line[key]
            weight = EMA * weight + (1 - EMA)
            result.append(average / weight)
        return result

    def recent(self, key: str) -> float:
        """Mean of a key over the last tenth of the training steps."""
        return mean(line[key] for line in self.training[-max(1, len(self.training) // 10) :])

    def validation(self, key: str, split: str = "valid") -> list[tuple[int, float]]:
        """(step, value) of every validation; raises MissingRun where there is none."""
        if split not in self.splits:
            raise MissingRun(f"{self.name} has no validation of {split}: run this experiment to its end")
        return [(line["step"], line[key]) for line in self.splits[split]]

    def last(self, key: str, split: str = "valid") -> float:
        """A key of the last validation."""
        return self.validation(key, split)[-1][1]


def paired(first: list[float], second: list[float]) -> dict[str, float | list[float] | None]:
    """Differences second - first of runs with the same seeds: their mean, and its 95% confidence interval.

    Student's t; None for one pair, which says nothing of the noise.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    number = len(differences)
    half = STUDENT_95[number] * stdev(differences) / math.sqrt(number) if number > 1 else None
    middle = mean(differences)
    interval = None if half is None else [middle - half, middle + half]
    return {"first": first, "second": second, "mean_difference": middle, "interval_95": interval}


def thinned(values: list, number: int = 400) -> list:
    """At most ``number`` evenly spaced values, the last among them: what a figure draws and its JSON holds."""
    if len(values) <= number:
        return values
    return [values[round(i * (len(values) - 1) / (number - 1))] for i in range(number)]
