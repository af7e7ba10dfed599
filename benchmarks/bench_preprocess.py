"""Preprocessing speed: captions beside megatron-core's loop, the index of 5 million sequences, images; in one run.

    python benchmarks/bench_preprocess.py --tokenizer gpt-neox-20b-tokenizer.json [--text captions.txt] [--json FILE]

captions  JSON lines to a token store in one process on one core: see text_contestants.py. All write the same bytes.
index     finalising a store of 5 million sequences: for ours also its digest and flushing it to the disk.
images    640 x 480 JPEG to 256 x 256 pixels and 512 codes, with patches of 8 and of 16: decoding alone and the search
          (float32) alone, each on one core; then whole jobs, with merging and flushing, on one core and on two, and a
          plain loop with Pillow and the same tokenizers, without ledger, digests and resuming, on one. Starting two
          workers is timed by a job of two samples, given apart and not counted in the row of two cores.

Contestants take turns. Rates are given by the processor's time (of all processes of a contestant together), which other
jobs on the machine disturb less, and by the clock. Ratios are of one round each: by the processor's time for what runs
on one core, by the clock for the images.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import text_contestants
import torch
from harness import environment
from PIL import Image

from megat2i.data.encode_part import Encoding, open_tokenizers
from megat2i.data.images import decode_image, fit_square, to_tensor
from megat2i.data.preprocess import preprocess
from megat2i.data.sources import find_parts
from megat2i.tokenizers.patch import PatchTokenizer
from megat2i.tokenizers.text import load_text_tokenizer, train_text_tokenizer

SIZE, CODES, BATCH = 256, 512, 64


def on_cores(number: int, call: Callable, *arguments) -> tuple[float, float]:
    """(processor's, clock's) seconds of a call on ``number`` cores, with the processes that it starts and waits for."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        cpu, clock = processor_time(), time.perf_counter()
        call(*arguments)
        return processor_time() - cpu, time.perf_counter() - clock
    finally:
        os.sched_setaffinity(0, before)


def processor_time() -> float:
    """Seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def spread(values: Iterable[float]) -> list[float]:
    """Median, least, most."""
    values = list(values)
    return [statistics.median(values), min(values), max(values)]


def rows(items: int, seconds: dict[str, list[tuple[float, float]]], base: str, by_clock: bool = False) -> list[dict]:
    """Of each system, from its (processor's, clock's) seconds of every round: rates, and their ratio to ``base``."""
    against = seconds.get(base)
    return [
        {
            "system": system,
            "seconds": values,
            "cpu_rate": spread(items / cpu for cpu, _ in values),
            "clock_rate": spread(items / clock for _, clock in values),
            "ratio": against and spread(b[by_clock] / a[by_clock] for a, b in zip(values, against, strict=True)),
        }
        for system, values in seconds.items()
    ]


def captions(folder: Path, number: int, rounds: int) -> dict:
    systems = text_contestants.contestants(folder / "captions.jsonl", folder / "text.json")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for turn in range(rounds):
        prefixes = [folder / f"captions-{turn}-{place}" for place in range(len(systems))]
        for prefix, (name, write) in zip(prefixes, systems.items(), strict=True):
            seconds[name].append(on_cores(1, write, prefix))
        text_contestants.check_equal(prefixes, (".bin", ".idx"))
        remove(folder, "captions-*-*")
    return {"rows": rows(number, seconds, "Megatron, transformers"), "figures": {}}


def index(folder: Path, sequences: int, rounds: int) -> dict:
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _, ready in zip(range(rounds), text_contestants.finalisers(sequences, folder), strict=False):
        for name, finalise in ready.items():
            seconds.setdefault(name, []).append(on_cores(1, finalise))
        text_contestants.check_equal([folder / file for file in ("ours", "theirs")[: len(ready)]], (".idx",))
        remove(folder, "ours.*")
    figures = {f"{name}, s by the clock": spread(clock for _, clock in values) for name, values in seconds.items()}
    return {"rows": rows(sequences, seconds, "Megatron"), "figures": figures}


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def make_images(folder: Path, samples: int, pixels: tuple[int, int]) -> Path:
    """A JSONL file with ``samples`` smooth random JPEGs and captions."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    with open(folder / "captions.jsonl", "w") as file:
        for number, caption in enumerate(text_contestants.emoji_captions(samples)):
            coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(pixels, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
            file.write(json.dumps({"image": f"{number}.jpg", "caption": caption}) + "\n")
    return folder / "captions.jsonl"


def decode(source: Path) -> list[torch.Tensor]:
    rows = map(json.loads, source.read_text().splitlines())
    contents = ((source.parent / row["image"]).read_bytes() for row in rows)
    return [to_tensor(fit_square(decode_image(content, SIZE), SIZE, "center")) for content in contents]


def plain_loop(source: Path, encoding: Encoding, output: Path) -> None:
    text, image = open_tokenizers(encoding)
    with open(output, "wb") as file:
        for line in source.read_text().splitlines():
            sample = json.loads(line)
            ids = text.encode([sample["caption"]])[0]
            with Image.open(source.parent / sample["image"]) as picture:
                picture = picture.convert("RGB")
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            codes = image.encode(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None])[0]
            file.write(np.asarray(ids, dtype=np.uint16).tobytes())
            file.write(codes.numpy().astype(np.uint16).tobytes())


def job(source: Path, encoding: Encoding, output: Path, workers: int, times: int = 1) -> None:
    preprocess(find_parts([str(source)] * times, "train"), output, encoding, workers, overwrite=False)


def images(folder: Path, source: Path, samples: int, patch: int, rounds: int) -> dict:
    """A random codebook: the speed of the search does not depend on the fit."""
    codebook = torch.randint(0, 256, (CODES, 3, patch, patch), generator=torch.Generator().manual_seed(0))
    PatchTokenizer(codebook.to(torch.uint8), SIZE).save(folder / f"patch{patch}.safetensors")
    encoding = Encoding(folder / "text.json", folder / f"patch{patch}.safetensors", "center")
    pixels, search = torch.stack(decode(source)), open_tokenizers(encoding)[1].encode
    calls = {
        "decoding alone, 1 core": (1, lambda _: decode(source)),
        "search alone, 1 core": (1, lambda _: [search(part) for part in pixels.split(BATCH)]),
        "plain loop, 1 core": (1, lambda output: plain_loop(source, encoding, output)),
        "ours, 1 core": (1, lambda output: job(source, encoding, output, 1)),
        "ours, 2 cores": (2, lambda output: job(source, encoding, output, 2)),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    starts, one = [], make_images(folder / f"one{patch}", 1, (8, 8))
    for turn in range(rounds):
        for name, (cores, call) in calls.items():
            seconds[name].append(on_cores(cores, call, folder / f"{patch}-{turn}-{name.replace(' ', '-')}"))
        starts.append(on_cores(2, job, one, encoding, folder / f"{patch}-{turn}-start", 2, 2))
        seconds["ours, 2 cores"][-1] = tuple(np.subtract(seconds["ours, 2 cores"][-1], starts[-1]).tolist())
    figures = {"starting two workers, s by the clock": spread(clock for _, clock in starts)}
    for column, name in enumerate(("processor's time", "clock")):
        times = [[one[column] for one in values] for system, values in seconds.items() if "plain" not in system]
        decoding, search, one_core, two_cores = map(np.array, times)
        if name != "clock":  # as if none of the two cores ever waited
            two_cores = two_cores / 2
        # On one core the stages take turns, on two the slower of them, alone on one, is the measure.
        figures[f"1 core, share of decoding then search, by the {name}"] = spread((decoding + search) / one_core)
        figures[f"2 cores, share of the slower of the two, by the {name}"] = spread(
            np.maximum(decoding, search) / two_cores
        )
    return {"rows": rows(samples, seconds, "plain loop, 1 core", by_clock=True), "figures": figures}


def show(workload: str, rows: list[dict], figures: dict[str, list[float]]) -> None:
    print(f"\n{workload:26}{'per cpu-second (least to most)':>38}{'per second':>14}  ratio (least to most)")
    for row in rows:
        (rate, least, most), ratio = row["cpu_rate"], row["ratio"]
        ratio = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else ""
        numbers = f"{rate:,.0f} ({least:,.0f} to {most:,.0f})"
        print(f"{row['system']:26}{numbers:>38}{row['clock_rate'][0]:>14,.0f}  {ratio}")
    for name, (middle, least, most) in figures.items():
        print(f"{name}: {middle:.2f} ({least:.2f} to {most:.2f})")


def prepare(folder: Path, text: Path | None, tokenizer: Path | None, count: int) -> str:
    """Put captions.jsonl and text.json into ``folder``; returns what the captions are."""
    if text:
        texts = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    else:
        texts = list(text_contestants.emoji_captions(count))
    text_contestants.write_lines(folder / "captions.jsonl", texts)
    if tokenizer:
        (folder / "text.json").write_bytes(tokenizer.read_bytes())
    else:
        train_text_tokenizer(texts[:10_000], 2000, folder / "text.json")
    tokens = load_text_tokenizer(folder / "text.json").encode(texts[:10_000])
    return f"{len(texts):,} captions of {statistics.mean(map(len, tokens)):.1f} tokens on average"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: 2,000 ids trained on the captions)")
    parser.add_argument("--text", type=Path, help="captions, one a line (default: made of the names of emoji)")
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--sequences", type=int, default=5_000_000, help="of the index")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = prepare(folder, args.text, args.tokenizer, args.captions)
        print(f"{about}; load {os.getloadavg()[0]:.1f} at the start")
        results = {"captions": captions(folder, (folder / "captions.jsonl").read_bytes().count(b"\n"), args.rounds)}
        results["index"] = index(folder, args.sequences, args.rounds)
        source = make_images(folder / "images", args.images, (640, 480))
        for patch in (8, 16):
            results[f"images, patches of {patch}"] = images(folder, source, args.images, patch, args.rounds)
    for workload, result in results.items():
        show(workload, **result)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")
    if args.json:
        content = {"environment": environment(torch.device("cpu")), "captions": about, "results": results}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
