"""Preprocessing speed: ours with 1 and 2 workers against a plain loop over the same files, in one run, interleaved.

Two workloads, generated into a temporary folder: "images" (640 x 480 JPEG to 256 x 256 pixels, 512 codes) and
"captions" (captions of about 100 tokens with 8 x 8 images, so that the text and the bookkeeping are what is measured).
The plain loop is one process with Pillow and the same tokenizers: open, crop, resize, encode, append to a file; no
ledger, no digests, no resuming. Our times are whole jobs: workers started, parts merged, everything flushed to the
disk. The seconds that starting two workers takes are measured by a job of two samples and given apart.

    python benchmarks/bench_preprocess.py --repeats 3 --json results.json
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megat2i.data.encode_part import Encoding, open_tokenizers
from megat2i.data.preprocess import preprocess
from megat2i.data.sources import find_parts
from megat2i.tokenizers.patch import PatchTokenizer
from megat2i.tokenizers.text import train_text_tokenizer

# Megatron-LM's own figure for tools/preprocess_data.py: 10 million JSONL lines, Qwen3-8B tokenizer, 16 workers or more.
PUBLISHED = {"system": "Megatron-LM preprocess_data.py (published, other hardware, text only)", "documents/s": 7246}
WORDS = [
    f"{first}{last}" for first in ("ka", "lo", "mi", "nu", "pe", "ra") for last in ("to", "ri", "sel", "nan", "bu")
]


def make_corpus(folder: Path, samples: int, pixels: tuple[int, int], words: int, format: str) -> Path:
    """A JSONL file with ``samples`` smooth random images and captions of ``words`` words."""
    folder.mkdir()
    generator, words_of = np.random.default_rng(0), random.Random(0)
    with open(folder / "captions.jsonl", "w") as file:
        for number in range(samples):
            coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize(pixels, Image.Resampling.BICUBIC)
            image.save(folder / f"{number}.{format}")
            caption = " ".join(words_of.choices(WORDS, k=words))
            file.write(json.dumps({"image": f"{number}.{format}", "caption": caption}) + "\n")
    return folder / "captions.jsonl"


def make_encoding(folder: Path, source: Path, image_size: int, patch_size: int) -> Encoding:
    """A text tokenizer of 2,000 ids and a random codebook of 512 codes: their speed does not depend on the fit."""
    captions = [json.loads(line)["caption"] for line in source.read_text().splitlines()[:500]]
    train_text_tokenizer(captions, 2000, folder / "text.json")
    codebook = torch.randint(0, 256, (512, 3, patch_size, patch_size), generator=torch.Generator().manual_seed(0))
    PatchTokenizer(codebook.to(torch.uint8), image_size).save(folder / "image.safetensors")
    return Encoding(folder / "text.json", folder / "image.safetensors", "center")


def plain_loop(source: Path, encoding: Encoding, output: Path) -> None:
    text, image = open_tokenizers(encoding)
    size = image.image_size
    with open(output, "wb") as file:
        for line in source.read_text().splitlines():
            row = json.loads(line)
            ids = text.encode([row["caption"]])[0]
            with Image.open(source.parent / row["image"]) as picture:
                picture = picture.convert("RGB")
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
            codes = image.encode(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None])[0]
            file.write(np.asarray(ids, dtype=np.uint16).tobytes())
            file.write(codes.numpy().astype(np.uint16).tobytes())


def ours(source: Path, encoding: Encoding, output: Path, workers: int, times: int = 1) -> None:
    preprocess(find_parts([str(source)] * times, "train"), output, encoding, workers, overwrite=False)


def start_up(folder: Path, encoding: Encoding) -> float:
    """Seconds of a job of two parts of one sample each with two workers."""
    source = make_corpus(folder / "one", 1, (8, 8), 4, "png")
    start = time.perf_counter()
    ours(source, encoding, folder / "started", 2, times=2)
    return round(time.perf_counter() - start, 1)


def measure(name: str, source: Path, samples: int, encoding: Encoding, folder: Path, repeats: int) -> list[dict]:
    """Rates of the plain loop and of ours, taken in turn ``repeats`` times."""
    open_tokenizers(encoding)
    systems: dict[str, Callable[[Path], None]] = {
        "plain loop": lambda output: plain_loop(source, encoding, output),
        "ours, 1 worker": lambda output: ours(source, encoding, output, 1),
        "ours, 2 workers": lambda output: ours(source, encoding, output, 2),
    }
    rates: dict[str, list[float]] = {system: [] for system in systems}
    for repeat in range(repeats):
        for number, (system, run) in enumerate(systems.items()):
            start = time.perf_counter()
            run(folder / f"{name}-{repeat}-{number}")
            rates[system].append(samples / (time.perf_counter() - start))
    base = statistics.median(rates["plain loop"])
    return [
        {
            "workload": name,
            "system": system,
            "samples/s": round(statistics.median(values), 1),
            "least": round(min(values), 1),
            "most": round(max(values), 1),
            "against the plain loop": round(statistics.median(values) / base, 2),
        }
        for system, values in rates.items()
    ]


def search_rate(repeats: int) -> dict:
    """Images/s of PatchTokenizer.encode alone: 256 x 256 pixels, 512 codes, patches of 8, one thread."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = PatchTokenizer(torch.randint(0, 256, (512, 3, 8, 8), generator=generator).to(torch.uint8), 256)
    images = torch.randint(0, 256, (64, 3, 256, 256), generator=generator).to(torch.uint8)
    tokenizer.encode(images[:8])
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        tokenizer.encode(images)
        rates.append(len(images) / (time.perf_counter() - start))
    values = {"samples/s": statistics.median(rates), "least": min(rates), "most": max(rates)}
    return {"workload": "search", "system": "ours, 1 thread"} | {key: round(rate, 1) for key, rate in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500, help="samples of the images workload")
    parser.add_argument("--captions", type=int, default=10_000, help="samples of the captions workload")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = [search_rate(max(5, args.repeats))]
        for workload, samples, pixels, words, format, image_size in (
            ("images", args.images, (640, 480), 12, "jpg", 256),
            ("captions", args.captions, (8, 8), 60, "png", 8),
        ):
            source = make_corpus(folder / workload, samples, pixels, words, format)
            encoding = make_encoding(folder / workload, source, image_size, 8)
            results += measure(workload, source, samples, encoding, folder, args.repeats)
        seconds = start_up(folder, encoding)
    print(f"\n{'workload':10}{'system':18}{'samples/s':>10}{'least':>10}{'most':>10}{'ratio':>7}")
    for row in results:
        ratio = row.get("against the plain loop", "")
        numbers = f"{row['samples/s']:>10}{row['least']:>10}{row['most']:>10}"
        print(f"{row['workload']:10}{row['system']:18}{numbers}{ratio:>7}")
    print(f"starting two workers: {seconds} s, included in the rows of 2 workers")
    print(f"{PUBLISHED['system']}: {PUBLISHED['documents/s']:,} documents/s")
    if args.json:
        environment = {
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "python": sys.version.split()[0],
        }
        environment |= {"torch": torch.__version__, "repeats": args.repeats}
        args.json.write_text(
            json.dumps(
                {
                    "environment": environment,
                    "results": results,
                    "two_workers_start_s": seconds,
                    "published": PUBLISHED,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
