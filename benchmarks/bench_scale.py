"""Memory against the number of rows: writing, merging and opening datasets of 10 thousand to 10 million rows.

Shards of 10,000 captioned images (8 text ids and 16 codes each) are written by the real writer with their manifests and
merged as tools/merge_data.py does; the result is opened as training does, and 1,000 rows are read. Each step is a
process of its own. Anonymous memory is what it allocates, the highest of samples taken every 2 ms. Peak RSS contains
the pages of the memory maps that it touched too, which the system takes back when it needs them: Linux maps 64 kB
around every place that is read.

    python benchmarks/bench_scale.py --rows 10000 1000000 10000000 --json results.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.manifest import ImageContent, Manifest, Source, TextContent, TokenCounts
from megat2i.data.merge import merge_datasets
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.tokenizers.patch import PatchTokenizer
from megat2i.tokenizers.text import train_text_tokenizer
from megat2i.vocab import IMAGE, TEXT, VocabLayout

SHARD, TEXT_IDS, CODES = 10_000, 8, 16
VOCABULARY, CODEBOOK = 300, 64


def write(prefix: Path, rows: int, seed: int) -> None:
    """A finished dataset of ``rows`` random rows in the folder of its tokenizers."""
    generator = np.random.default_rng(seed)
    text = generator.integers(0, VOCABULARY, (SHARD, TEXT_IDS), dtype=np.uint16)
    image = generator.integers(0, CODEBOOK, (SHARD, CODES), dtype=np.uint16)
    with IndexedWriter(prefix, np.uint16) as writer:
        for row in range(rows):
            writer.add_document((text[row % SHARD], image[row % SHARD]), (TEXT, IMAGE))
    files = [prefix.parent / name for name in ("text.json", "image.safetensors")]
    Manifest(
        documents=rows,
        sequences=2 * rows,
        tokens=TokenCounts(rows * TEXT_IDS, rows * CODES),
        dtype="uint16",
        text=TextContent(VOCABULARY, int(text.min()), int(text.max()), files[0].name, "tokenizers", "ab"),
        image=ImageContent(
            CODEBOOK, int(image.min()), int(image.max()), (4, 4), 32, "center", "float32", files[1].name, "patch", "cd"
        ),
        sources=(Source(prefix.name, rows, size=1),),
        index_sha256=writer.digests.index_sha256,
        bin_blocks=writer.digests.bin_blocks,
    ).write(prefix)


def write_shards(folder: Path, rows: int) -> None:
    train_text_tokenizer(["a caption"], VOCABULARY, folder / "text.json")
    PatchTokenizer(torch.zeros(CODEBOOK, 3, 8, 8, dtype=torch.uint8), 32).save(folder / "image.safetensors")
    for shard in range(-(-rows // SHARD)):
        write(folder / f"{shard:06d}", SHARD, shard)


def merge(folder: Path, rows: int) -> None:
    merge_datasets([folder / f"{shard:06d}" for shard in range(-(-rows // SHARD))], folder / f"merged-{rows}", True)


def open_index(folder: Path, rows: int) -> None:
    assert IndexedDataset(folder / f"merged-{rows}").number_of_documents == rows


def open_rows(folder: Path, rows: int) -> T2IDataset:
    dataset = T2IDataset(folder / f"merged-{rows}", VocabLayout(VOCABULARY, CODEBOOK), 32)
    assert len(dataset) == rows
    return dataset


def read_rows(folder: Path, rows: int) -> None:
    dataset = open_rows(folder, rows)
    for sample in np.random.default_rng(0).integers(0, rows, 1000):
        dataset.row(int(sample), 0)


STEPS = {
    "write one store": lambda folder, rows: write(folder / f"one-{rows}", rows, 0),
    "merge shards": merge,
    "open the index": open_index,
    "open the rows": open_rows,
    "open, read 1,000 rows": read_rows,
}


def measured(step: str, folder: Path, rows: int) -> dict:
    """Seconds and memory (MB) of a step in this process, over what its imports took."""
    highest, stop = 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, status("RssAnon"))

    status_before, anonymous_before = status("VmHWM"), status("RssAnon")
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    STEPS[step](folder, rows)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    anonymous = max(0.0, highest - anonymous_before)
    peak = status("VmHWM")
    row = {"step": step, "rows": rows, "seconds": round(seconds, 2), "anonymous_mb": round(anonymous, 1)}
    return row | {"peak_rss_mb": round(peak, 1), "peak_rss_growth_mb": round(peak - status_before, 1)}


def status(field: str) -> float:
    """A field of this process's status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def in_a_process(step: str, folder: Path, rows: int) -> dict:
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--rows", str(rows)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder; 2 GB for 10 million)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(measured(args.step, args.folder, args.rows[0])))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, results = Path(name), []
        write_shards(folder, max(args.rows))
        print(f"{'step':28}{'rows':>12}{'seconds':>10}{'anonymous MB':>14}{'peak RSS MB':>13}{'growth MB':>11}")
        for step in STEPS:
            for rows in args.rows:
                row = in_a_process(step, folder, rows)
                results.append(row)
                print(f"{step:28}{rows:12,}{row['seconds']:10.2f}{row['anonymous_mb']:14.1f}"
                      f"{row['peak_rss_mb']:13.1f}{row['peak_rss_growth_mb']:11.1f}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
