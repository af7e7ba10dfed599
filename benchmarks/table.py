"""The tables of benchmarks/README.md, made from the newest record of every device in benchmarks/results.

    python benchmarks/table.py [--write] [FILE ...]

prints the tables of ``results/`` or of the files named; ``--write`` puts those of ``results/`` into the README, where
a test compares the two.
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
README, RESULTS = HERE / "README.md", HERE / "results"
BEGIN, END = "<!-- tables: made by benchmarks/table.py -->", "<!-- end of tables -->"
NONE_YET = "There are no figures from a GPU yet."
# key of a row: heading; other numbers stand under their own keys
HEADINGS = {
    "ms": "ms (smallest, largest)",
    "ratio": "x time",
    "tflops": "TFLOP/s",
    "mfu": "MFU",
    "of_copy": "of copy",
    "of_floor": "of floor",
    "tokens_per_s": "tokens/s",
    "images_per_s": "images/s",
    "floor_ms": "floor, ms",
    "peak_mb": "peak MB",
}
SHARES = {"mfu", "of_copy", "of_floor"}
LEFT_OUT = {"min", "max", "rounds", "ours", "micro_batch"}


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md")
    arguments = parser.parse_args()
    if arguments.write:
        README.write_text(with_tables(README.read_text(), tables(newest(RESULTS))))
    else:
        print(tables(arguments.files or newest(RESULTS)))


def newest(folder: Path) -> list[Path]:
    """The last record of every device: names end in the date."""
    by_device = {path.stem[: -len("-2000-01-01")]: path for path in sorted(folder.glob("*.json"))}
    return list(by_device.values())


def with_tables(readme: str, text: str) -> str:
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}"


def tables(files: list[Path]) -> str:
    """Every section of every benchmark of ``files`` as Markdown."""
    parts = []
    for path in files:
        record = json.loads(path.read_text())
        for benchmark in (name for name in record if name != "device"):
            entry = record[benchmark]
            parts.append(f"### {record['device']}: {benchmark}\n\n{conditions(entry)}")
            parts += [f"{title}\n\n{table(rows)}" for title, rows in entry["sections"].items()]
    return "\n\n".join(parts) or NONE_YET


def conditions(entry: dict) -> str:
    """The line above a benchmark's tables."""
    environment, gpu = entry["environment"], entry["gpu"] or {}
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    state = f" Driver {gpu['driver']}, {gpu['sm_mhz']} MHz at the end." if gpu else ""
    commit, _, changes = (environment["git_commit"] or "an unknown commit").partition("+")
    date, commit = environment["started"][:10], commit[:10] + (" with changes" if changes else "")
    return f"`{environment['command']}` at {commit}, {date}: {versions}.{state}"


def table(rows: dict[str, dict]) -> str:
    """Columns are the numbers that any row has; a row without says why."""
    keys = []
    for row in rows.values():
        keys += [k for k, v in row.items() if isinstance(v, int | float) and k not in LEFT_OUT and k not in keys]
    keys.sort(key=lambda key: list(HEADINGS).index(key) if key in HEADINGS else len(HEADINGS))  # stable for the others
    lines = [["", *(HEADINGS.get(key, key) for key in keys)], ["---"] * (len(keys) + 1)]
    for name, row in rows.items():
        why = row.get("error") or row.get("skipped")
        cells = [why] + [""] * (len(keys) - 1) if why else [cell(row, key) for key in keys]
        lines.append([name, *(part.replace("|", "/") for part in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, int | float):
        return ""
    if key in SHARES:
        return f"{value:.1%}"
    if key == "ms" and "min" in row:
        return f"{number(value)} ({number(row['min'])}, {number(row['max'])})"
    return number(value)


def number(value: float) -> str:
    """Three digits, or all in front of the point."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
