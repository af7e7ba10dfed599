"""Seconds of a training step with and without the comparison of the data's digests beside it, in one run.

``python benchmarks/bench_verification.py [--json FILE]`` makes steps of the demo's model on random rows. In every other
round a thread compares a large store with its digests, as every training does (``megat2i/data/verification.py``); it is
large enough that the thread never ends. Processor time is counted too: wall time alone hides what another core does.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_training import ROOT, our_step, random_batch
from harness import Record, parser_for

from megat2i import config
from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.verification import Verification
from megat2i.runtime import Backend

STORE_TOKENS = 1 << 28  # 512 MiB of uint16; at DUTY a step of a second compares about 6 MB


def main() -> None:
    """Time both in turn and print medians, spread and the ratio."""
    parser = parser_for(__doc__, minutes=False)
    parser.add_argument("--rounds", type=int, default=9, help="of each")
    parser.add_argument("--steps", type=int, default=10, help="steps in a round")
    arguments = parser.parse_args()
    settings = config.load(ROOT / "configs/openmoji_demo.yaml")
    backend = Backend.resolve(settings)
    backend.start(seed=0)
    step = our_step(settings, backend, random_batch(settings).to(backend.device))
    with tempfile.TemporaryDirectory() as folder:
        store = large_store(Path(folder) / "store")
        rounds = take_turns(step, store, Path(folder) / "run", arguments.rounds, arguments.steps)
    ratios = {
        f"{clock} ratio": [a[clock] / b[clock] for a, b in zip(rounds["with"], rounds["without"], strict=True)]
        for clock in ("wall", "processor")
    }
    row = {}
    for name, values in ({side: [one["wall"] for one in made] for side, made in rounds.items()} | ratios).items():
        row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        print(f"{name:16} {row[name]['median']:8.4f} ({min(values):.4f} to {max(values):.4f})")
    record = Record("verification", arguments.json, backend.device)
    record.add("seconds per step", row)
    record.finish()


def large_store(prefix: Path) -> IndexedDataset:
    """A store of STORE_TOKENS without a manifest, whose digests a run records as it meets them."""
    tokens = np.random.default_rng(0).integers(0, 1 << 16, STORE_TOKENS, dtype=np.uint16)
    with IndexedWriter(prefix, np.uint16) as writer:
        for part in np.split(tokens, 256):
            writer.add_document([part], None)
    return IndexedDataset(prefix)


def take_turns(step, store: IndexedDataset, run_dir: Path, rounds: int, steps: int) -> dict[str, list[dict]]:
    """Seconds per step of every round on the clock on the wall and of this process's threads."""
    step()  # warm-up
    made: dict[str, list[dict]] = {"without": [], "with": []}
    for _ in range(rounds):
        for side, results in made.items():
            verification = Verification([store] if side == "with" else [], lambda: (), run_dir)
            verification.go_on("")
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            results.append(
                {
                    "wall": (time.perf_counter() - wall) / steps,
                    "processor": (time.process_time() - processor) / steps,
                }
            )
            if side == "with" and verification.complete:
                raise RuntimeError("the store is too small: the thread has ended during a round")
            verification.close()
    return made


if __name__ == "__main__":
    main()
