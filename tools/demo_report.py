"""The results of the demo: ``samples.png``, ``curves.png`` and ``quality.json`` in the run folder.

``python tools/demo_report.py --run runs/demo`` draws the prompts of 200 training and 100 held-out pictures, measures
how often a drawing is nearest to its own true picture, and plots the losses from ``metrics.jsonl``.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import megat2i  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import matplotlib
import numpy as np
import torch

from megat2i.checkpoint import CheckpointError
from megat2i.config import Config, ConfigError
from megat2i.data.images import to_tensor
from megat2i.data.openmoji import Drawing, captioned_images, render
from megat2i.evaluate.retrieval import pixel_space, quality
from megat2i.files import DataFileError, PendingFile, commit, write_file
from megat2i.generate import Sampler
from megat2i.pictures import save_png, sheet

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the choice of a backend without a display)

SEEN, UNSEEN = 200, 100  # prompts that quality.json measures
SHOWN = 16  # of each kind on samples.png
SEED = 0
SMOOTHING = 0.95  # of the plotted training curves


def main() -> None:
    """Make the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of the demo")
    folder = parser.parse_args().run
    plot_curves(folder)
    sampler, settings = Sampler.from_run(folder, torch.device("cpu"), torch.float32)
    seen, unseen = drawings("train", SEEN), drawings("valid", UNSEEN)
    images = draw(sampler, settings, seen + unseen)
    size = sampler.image_tokenizer.image_size
    result = {}
    for name, chosen, generated in (("seen", seen, images[: len(seen)]), ("unseen", unseen, images[len(seen) :])):
        result[name] = quality(generated, pictures(chosen, size))
        print(f"{name}: nearest to its own true picture among 10: {rates(result[name])}")
    write_file(folder / "quality.json", (json.dumps(result, indent=1) + "\n").encode())
    show(folder, settings, seen, unseen, images, size)


def drawings(split: str, count: int) -> list[Drawing]:
    """A fixed random choice of ``count`` pictures of a split."""
    return random.Random(SEED).sample(captioned_images(split), count)


def draw(sampler: Sampler, settings: Config, chosen: list[Drawing]) -> torch.Tensor:
    """One image [N, 3, H, W] uint8 for the caption of each drawing, with the run's sampling settings."""
    prompts = [drawing.caption for drawing in chosen]
    return torch.from_numpy(sampler.images(prompts, [SEED] * len(prompts), settings.sampling))


def pictures(chosen: list[Drawing], size: int) -> torch.Tensor:
    """The true pictures [N, 3, size, size] uint8, as drawn by the font, not as the tokenizer sees them."""
    return torch.stack([to_tensor(render(drawing.characters, size)) for drawing in chosen])


def rates(result: dict) -> str:
    return ", ".join(
        f"{space} {values['rate']:.0%} (chance {values['chance']:.0%})" for space, values in result.items()
    )


def show(folder: Path, settings: Config, seen, unseen, images: torch.Tensor, size: int) -> None:
    """samples.png: beside each generated picture the training picture that is nearest to it in pixels."""
    training = pictures(captioned_images("train"), size)
    cells = []
    for kind, chosen, offset in (("", seen, 0), ("held out: ", unseen, len(seen))):
        for number, drawing in enumerate(chosen[:SHOWN]):
            image = images[offset + number]
            nearest = torch.cdist(pixel_space(image[None]), pixel_space(training)).argmin()
            cells.append((kind + drawing.caption, [image.numpy(), training[nearest].numpy()]))
    sampling = settings.sampling
    title = (
        f"left: generated, right: nearest training picture. guidance {sampling.guidance}, temperature "
        f"{sampling.temperature}, top-k {sampling.top_k}, top-p {sampling.top_p}, seed {SEED}"
    )
    save_png(sheet(cells, columns=8, side=96, title=title), folder / "samples.png")


def plot_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: loss and perplexity of text and image, and the total, in training and held out."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [entry for entry in entries if "split" not in entry]
    valid = [entry for entry in entries if entry.get("split") == "valid"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for axis, prefix, scale, label in (
        (axes[0], "loss", "linear", "loss (nats)"),
        (axes[1], "ppl", "log", "perplexity"),
    ):
        for color, name in (("tab:blue", "text"), ("tab:orange", "image"), ("black", "total")):
            lines = [[(e["step"], value(e, prefix, name)) for e in group] for group in (train, valid)]
            (steps, values), held_out = zip(*lines[0], strict=True), lines[1]
            axis.plot(steps, values, color=color, alpha=0.15, linewidth=0.8)
            axis.plot(steps, smoothed(values), color=color, label=name)
            if held_out:
                axis.plot(*zip(*held_out, strict=True), "o--", color=color, markersize=4, label=f"{name}, held out")
        axis.set(xlabel="step", ylabel=label, yscale=scale)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{folder}: thin: each step, thick: moving average ({SMOOTHING})")
    figure.tight_layout()
    file = PendingFile(folder / "curves.png")
    figure.savefig(file, dpi=110, format="png")
    commit([file])


def value(entry: dict, prefix: str, name: str) -> float:
    if name == "total":
        return entry["loss"] if prefix == "loss" else float(np.exp(entry["loss"]))
    return entry[f"{prefix}/{name}"]


def smoothed(values) -> list[float]:
    """Exponential moving average without the bias of its start."""
    average, weight, result = 0.0, 0.0, []
    for number in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * number
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(average / weight)
    return result


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataFileError, CheckpointError) as error:
        sys.exit(f"error: {error}")
