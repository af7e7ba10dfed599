"""Draw images from prompts with a trained run: ``python tools/generate.py --run runs/demo --prompts "red apple"``.

Writes ``samples.jsonl`` (prompt, seed, settings and file of each image), one PNG an image, and ``grid.png`` of the
first ones. An image is decided by prompt, seed and settings, the batch size among them; the other prompts of the call
do not matter. The same command goes on where it was stopped.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path

import megat2i  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import numpy as np
import torch
from PIL import Image

from megat2i.checkpoint import CheckpointError
from megat2i.config import ConfigError
from megat2i.files import DataFileError, write_file
from megat2i.generate import BATCH_SIZE, Sampler
from megat2i.interrupt import said_on_interrupt
from megat2i.pictures import enlarge, save_png, sheet
from megat2i.printable import ArgumentParser
from megat2i.progress import Progress, count, waiting
from megat2i.runtime import DTYPES

GRID_COLUMNS, GRID_IMAGES = 8, 64


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder, e.g. runs/demo")
    parser.add_argument("--prompts", nargs="*", default=[], metavar="PROMPT")
    parser.add_argument(
        "--prompts-file", type=Path, help="one prompt a line; .jsonl: one object a line with its prompt"
    )
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
        prompts += read_prompts(arguments.prompts_file)
    if not prompts:
        raise ConfigError("no prompts: give --prompts or --prompts-file")
    if arguments.images_per_prompt < 1 or arguments.batch_size < 1:
        raise ConfigError("--images-per-prompt and --batch-size must be at least 1")
    dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    with waiting(f"loading {arguments.run}"):
        sampler, settings = Sampler.from_run(arguments.run, torch.device(arguments.device), DTYPES[dtype])
        weights = digest(sampler.model)
    given = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "guidance")}
    sampling = dataclasses.replace(settings.sampling, **{k: v for k, v in given.items() if v is not None})
    sampling.check()
    if sampling.guidance != 1 and settings.data.caption_dropout == 0 and not arguments.force:
        raise ConfigError(
            f"{arguments.run}: trained with data.caption_dropout=0, so guidance {sampling.guidance} has nothing to "
            "compare with; use --guidance 1, or --force"
        )
    jobs = [(p, arguments.seed + number) for p in prompts for number in range(arguments.images_per_prompt)]
    drawn = dataclasses.asdict(sampling) | {"batch_size": arguments.batch_size, "dtype": dtype}
    del drawn["prompts"]
    drawn |= {"device": arguments.device, "weights_sha256": weights}
    output = arguments.output or arguments.run / "samples"
    names = begin(output, jobs, drawn)
    missing = [number for number, name in enumerate(names) if not (output / name).exists()]
    with Progress(len(jobs), "drawing", "images", len(jobs) - len(missing)) as shown:
        for start in range(0, len(missing), arguments.batch_size):
            batch = missing[start : start + arguments.batch_size]
            prompts, seeds = zip(*(jobs[number] for number in batch), strict=True)
            images = sampler.images(prompts, seeds, sampling, arguments.batch_size)
            for number, image in zip(batch, images, strict=True):
                save_png(enlarge(image, image.shape[-1]), output / names[number])
            shown.update(len(batch))
    first = [np.asarray(Image.open(output / name)).transpose(2, 0, 1) for name in names[:GRID_IMAGES]]
    cells = [(prompt, [image]) for (prompt, _), image in zip(jobs, first, strict=False)]
    save_png(sheet(cells, GRID_COLUMNS), output / "grid.png")
    print(f"{count(len(jobs), 'image')} and grid.png in {output}")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in its order; raises DataFileError."""
    text = path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows' editors write
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    try:
        return [json.loads(line)["prompt"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        remedy = 'Write one object with the key "prompt" a line'
        raise DataFileError(path, f"a line is not an object with a prompt ({error!r})", remedy) from error


def begin(output: Path, jobs: list[tuple[str, int]], drawn: dict) -> list[str]:
    """Files of all the images; those that ``output`` lists of another call, or of other weights, are removed."""
    names = [
        f"{number:05d}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower())[:60].strip('-')}-{seed}.png"
        for number, (prompt, seed) in enumerate(jobs)
    ]
    lines = [
        json.dumps({"prompt": prompt, "seed": seed, "file": name, **drawn})
        for (prompt, seed), name in zip(jobs, names, strict=True)
    ]
    content, listing = ("\n".join(lines) + "\n").encode(), output / "samples.jsonl"
    if not listing.exists() or listing.read_bytes() != content:
        output.mkdir(parents=True, exist_ok=True)
        earlier = listed(listing) if listing.exists() else []
        listing.unlink(missing_ok=True)  # first: images without a list of them are nobody's
        for name in [*earlier, *names]:
            (output / name).unlink(missing_ok=True)
        write_file(listing, content)
    return names


def listed(listing: Path) -> list[str]:
    """The images that an earlier call listed; raises DataFileError where the file is no such list."""
    try:
        names = [json.loads(line)["file"] for line in listing.read_text().splitlines()]
        if any(Path(name).name != name for name in names):
            raise ValueError("a file in another folder")
    except (ValueError, KeyError, TypeError) as error:
        raise DataFileError(listing, f"no list of samples ({error!r})", "Choose another --output") from error
    return names


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights: a run that has trained on since draws other images."""
    sha256 = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha256.update(name.encode())
        sha256.update(tensor.flatten().view(torch.uint8).cpu().numpy())
    return sha256.hexdigest()


if __name__ == "__main__":
    try:
        with said_on_interrupt("interrupted; the same command goes on where it was"):
            main()
    except (ConfigError, DataFileError, CheckpointError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
