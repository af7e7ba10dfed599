"""The largest differences between the records of two runs, metric by metric.

``python tools/compare_runs.py runs/a runs/b`` takes run folders or metrics.jsonl files and compares the steps that both
have. Times and speeds are left out. The relative difference is |a - b| / max(|a|, |b|), 0 where both are 0. With
``--tolerance X`` the exit status is 1 where a relative difference is above X, where only one side has a value, and
where no step is in both.
"""

import argparse
import json
import math
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from megat2i.files import DataFileError
from megat2i.printable import ArgumentParser

MACHINE = {"tokens_per_s", "step_s", "mfu"}  # they tell the speed of the machine, not what was learnt
Records = dict[tuple[int, str], dict]


class Difference(NamedTuple):
    """Two values of a metric at one step and how far they are apart; infinitely where one is missing or not finite."""

    step: int
    values: tuple
    absolute: float
    relative: float


def main() -> int:
    """Print the table; returns the exit status."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="run folder or metrics.jsonl")
    parser.add_argument("--tolerance", type=float, help="largest relative difference that passes")
    arguments = parser.parse_args()
    one, other = (read(path) for path in arguments.runs)
    shared = sorted(one.keys() & other.keys())
    for path, only in zip(arguments.runs, (one.keys() - other.keys(), other.keys() - one.keys()), strict=True):
        for split in sorted({split for _, split in only}):
            print(f"{split} steps only in {path}: {ranges(sorted(step for step, of in only if of == split))}")
    if not shared:
        print("no step is in both")
        return 1
    print(f"{len(shared)} records in both, to step {shared[-1][0]}")
    worst = 0.0
    for metric, differences in compare(one, other, shared).items():
        absolute = max(differences, key=lambda difference: difference.absolute)
        relative = max(differences, key=lambda difference: difference.relative)
        worst = max(worst, relative.relative)
        line = f"{metric:24} absolute {absolute.absolute:<9.3g} at {absolute.step:<7} "
        line += f"relative {relative.relative:<9.3g} at {relative.step:<7}"
        print(f"{line} {relative.values}" if relative.relative else line.rstrip())
    if arguments.tolerance is None:
        return 0
    passed = worst <= arguments.tolerance
    print(f"largest relative difference {worst:.3g}: {'within' if passed else 'ABOVE'} {arguments.tolerance:g}")
    return 0 if passed else 1


def read(path: Path) -> Records:
    """{(step, "train" or the split): the record}; a line that a killed run left half-written at the end is left out."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(path, f"not readable: {error}", "Give a run folder or its metrics.jsonl") from error
    records: Records = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines) and number > 1:
                continue
            raise DataFileError(path, f"line {number} is not JSON: {error}", "Is it a metrics.jsonl?") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise DataFileError(path, f"line {number} is no record with a step", "Is it a metrics.jsonl?")
        records[entry["step"], entry.get("split", "train")] = entry
    if not records:
        raise DataFileError(path, "it holds no record", "Has the run made a step?")
    return records


def compare(one: Records, other: Records, shared: list[tuple[int, str]]) -> dict[str, list[Difference]]:
    """The differences of every metric, over the records in both, training first."""
    found: dict[str, list[Difference]] = {}
    for step, split in sorted(shared, key=lambda key: key[1] != "train"):
        a, b = one[step, split], other[step, split]
        for key in [*a, *(key for key in b if key not in a)]:
            if key in MACHINE or key in ("step", "split"):
                continue
            name = key if split == "train" else f"{split}: {key}"
            found.setdefault(name, []).append(difference(step, a.get(key), b.get(key)))
    return found


def difference(step: int, a, b) -> Difference:
    """Equal values, among them null on both sides and the same not-a-number, do not differ."""
    if a == b:
        return Difference(step, (a, b), 0.0, 0.0)
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (a, b)):
        return Difference(step, (a, b), math.inf, math.inf)
    return Difference(step, (a, b), abs(a - b), abs(a - b) / max(abs(a), abs(b)))


def ranges(steps: list[int]) -> str:
    """Ascending numbers in short, e.g. "1-4, 7"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `compare_runs.py A B | head` ends without a word
    try:
        sys.exit(main())
    except DataFileError as error:
        sys.exit(f"error: {error}")
