"""``make soak MINUTES=n``: hurt trainings for n minutes; exit code 1 where a run is lost, wrong, late or crashed."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked process has none of its parent's threads

import argparse
import itertools
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from soak.campaign import PER_ROUND, Campaign, available, in_parallel, prepare, rounds
from soak.ranks import import_all
from soak.report import FAILURES, markdown, plain
from soak.world import VARIANTS, scratch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="begin no round after this time")
    parser.add_argument("--seed", type=int, default=1, help="decides every round; with another one others are tried")
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--count", type=int, help=f"rounds of {PER_ROUND} faults; without: as many as fit")
    parser.add_argument("--kind", help="only kinds of faults whose names hold this")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at a time")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="engines and layouts that take part")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every time limit: for a busy machine")
    parser.add_argument("--folder", type=Path, help="where to work; by default in memory where there is room")
    parser.add_argument("--json", type=Path, help="write every fault to this file")
    parser.add_argument("--table", type=Path, help="write the table as Markdown to this file")
    return parser.parse_args()


def main() -> int:
    options, records, started = arguments(), [], time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through every ``finally``
    import_all()
    kinds = [kind for kind in available(say) if not options.kind or options.kind in kind.name]
    folder = scratch(options.folder)
    try:
        campaign = Campaign(folder, options.seed, kinds, options.variants, options.patience)
        prepare(campaign, options.jobs)
        last = None if options.count is None else options.first + options.count
        numbers = itertools.islice(itertools.count(), options.first, last)
        seconds = options.minutes * 60 - (time.monotonic() - started)
        for _, done in in_parallel(options.jobs, rounds(campaign, numbers, seconds), folder):
            records += done
            for record in done:
                if record["outcome"] in FAILURES:
                    say(failure(record, options.seed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report(options, records, time.monotonic() - started)


def failure(record: dict, seed: int) -> str:
    number = record["fault"].split(".")[0]
    mode = "background" if record["background"] else "synchronous"
    return (
        f"{record['outcome']}: fault {record['fault']} ({record['kind']}; {record['variant']}, {mode} checkpoints): "
        f"{record['text']}\n    again: make soak SEED={seed} FIRST={number} COUNT=1"
    )


def report(options: argparse.Namespace, records: list[dict], seconds: float) -> int:
    """Print and write the table; returns the exit code."""
    say(plain(records))
    failed = sum(record["outcome"] in FAILURES for record in records)
    say(f"{len(records)} faults in {seconds:.0f} s, seed {options.seed}: {failed} failed")
    if options.json:
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    if options.table:
        options.table.write_text(markdown(records))
    return 1 if failed or not records else 0


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
