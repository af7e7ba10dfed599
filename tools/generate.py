"""Draw images from prompts with a trained run: ``python tools/generate.py --run runs/demo --prompts "red apple"``.

Writes one PNG an image, ``grid.png`` and ``samples.jsonl`` (prompt, seed, settings and file of each image). An image is
decided by prompt, seed and settings, the batch size among them; the other prompts of the call do not matter.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import torch

from megat2i.checkpoint import CheckpointError
from megat2i.config import ConfigError
from megat2i.files import DataFileError, PendingFile, commit
from megat2i.generate import BATCH_SIZE, Sampler
from megat2i.pictures import enlarge, save_png, sheet
from megat2i.runtime import DTYPES

GRID_COLUMNS = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder, e.g. runs/demo")
    parser.add_argument("--prompts", nargs="*", default=[], metavar="PROMPT")
    parser.add_argument("--prompts-file", type=Path, help="one prompt a line")
    parser.add_argument("--output", type=Path, help="folder for the images (default: RUN/samples)")
    parser.add_argument("--images-per-prompt", type=int, default=1, metavar="N", help="seeds SEED .. SEED + N - 1")
    parser.add_argument("--seed", type=int, default=0)
    for name, kind in (("temperature", float), ("top-k", int), ("top-p", float), ("guidance", float)):
        parser.add_argument(f"--{name}", type=kind, help="default: the run's sampling settings")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="images drawn at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--force", action="store_true", help="guidance on a model that never saw an empty caption")
    return parser.parse_args()


def main() -> None:
    """Sample what the command line asks for."""
    arguments = parse_arguments()
    prompts = list(arguments.prompts)
    if arguments.prompts_file:
        prompts += [line.strip() for line in arguments.prompts_file.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("no prompts: give --prompts or --prompts-file")
    if arguments.images_per_prompt < 1 or arguments.batch_size < 1:
        raise ConfigError("--images-per-prompt and --batch-size must be at least 1")
    dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    sampler, settings = Sampler.from_run(arguments.run, torch.device(arguments.device), DTYPES[dtype])
    given = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "guidance")}
    sampling = dataclasses.replace(settings.sampling, **{k: v for k, v in given.items() if v is not None})
    sampling.check()
    if sampling.guidance != 1 and settings.data.caption_dropout == 0 and not arguments.force:
        raise ConfigError(
            f"{arguments.run}: trained with data.caption_dropout=0, so guidance {sampling.guidance} has nothing to "
            "compare with; use --guidance 1, or --force"
        )
    jobs = [(p, arguments.seed + number) for p in prompts for number in range(arguments.images_per_prompt)]
    images = sampler.images([p for p, _ in jobs], [s for _, s in jobs], sampling, arguments.batch_size)
    drawn = dataclasses.asdict(sampling) | {"batch_size": arguments.batch_size, "dtype": dtype}
    del drawn["prompts"]
    write(arguments.output or arguments.run / "samples", jobs, images, drawn)


def write(output: Path, jobs: list[tuple[str, int]], images, drawn: dict) -> None:
    """One PNG an image, the grid and the list of what was ``drawn`` with which settings."""
    lines = []
    for number, ((prompt, seed), image) in enumerate(zip(jobs, images, strict=True)):
        name = f"{number:05d}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower())[:60].strip('-')}-{seed}.png"
        save_png(enlarge(image, image.shape[-1]), output / name)
        lines.append(json.dumps({"prompt": prompt, "seed": seed, "file": name, **drawn}) + "\n")
    save_png(
        sheet([(p, [image]) for (p, _), image in zip(jobs, images, strict=True)], GRID_COLUMNS), output / "grid.png"
    )
    listing = PendingFile(output / "samples.jsonl")
    listing.write("".join(lines).encode())
    commit([listing])
    print(f"{len(jobs)} images and grid.png in {output}")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataFileError, CheckpointError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
