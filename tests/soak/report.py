"""The table of a campaign: what was tried of each kind, what became of it, and how long that took."""

from collections import defaultdict
from statistics import median

FAILURES = ("LOST", "WRONG", "LATE", "TRACEBACK")
HEAD = ("fault", "tried", "recovered", "refused, repaired, recovered", "by a training", *FAILURES, "median s", "max. s")


def rows(records: list[dict]) -> list[tuple]:
    """A row, as HEAD has its columns, for each kind and detail, and one for all."""
    groups = defaultdict(list)
    for record in records:
        groups[", ".join(filter(None, (record["kind"], record["detail"])))].append(record)
    return [_row(name, groups[name]) for name in sorted(groups)] + [_row("all", records)]


def _row(name: str, records: list[dict]) -> tuple:
    outcomes = [record["outcome"] for record in records]
    seconds = [record["seconds"] for record in records if record["seconds"] is not None]
    trained = sum(record["trained"] for record in records)
    times = (f"{median(seconds):.2f}", f"{max(seconds):.1f}") if seconds else ("", "")
    counts = [outcomes.count(outcome) for outcome in ("equal", "refused")]
    return (name, len(records), *counts, trained, *(outcomes.count(failure) for failure in FAILURES), *times)


def markdown(records: list[dict]) -> str:
    """The table for docs/faults.md."""
    lines = [HEAD, tuple("-" * 3 for _ in HEAD), *rows(records)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def plain(records: list[dict]) -> str:
    """The table for a terminal."""
    lines = [tuple(str(cell) for cell in line) for line in [HEAD, *rows(records)]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)
