"""The paper's figures and tables from the records of the runs: each as numbers (JSON), PNG and SVG.

Every function takes the folder of the reproduction and the scale, and returns the numbers it drew. A run that is
missing is an error, never a blank.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from megat2i.experiments.arms import (
    ALIGNMENT,
    POLICIES,
    Arm,
    Scale,
    image_only,
    selective_name,
    sweep,
    twins,
)  # fmt: skip
from megat2i.experiments.record import EMA, MissingRun, Record, paired, thinned
from megat2i.files import write_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the choice of a backend without a display)
from matplotlib.ticker import LogLocator  # noqa: E402

COLOURS = {"pretrained": "tab:blue", "random": "tab:orange", "aligned": "tab:green"}
SMOOTHED = f"EMA {EMA}"
SOURCES, SHOWN = 3, 8  # rows (true, pre-trained, random) and columns (prompts) of the picture grid
plt.rcParams.update({"svg.hashsalt": "megat2i", "figure.dpi": 110, "font.size": 9})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})


def fig3(folder: Path, scale: Scale) -> dict:
    """Total perplexity of the twins against tokens, smoothed; the last held-out losses, paired by seed."""
    runs = _twins(folder, scale)
    figure, axis = plt.subplots(figsize=(6, 4))
    _draw_twins(axis, runs, "loss", exponential=True)
    axis.set(xlabel="tokens", ylabel=f"perplexity of all tokens ({SMOOTHED})", yscale="log")
    numbers = {"curves": _curves(runs, ["loss"]), "held_out_loss": _compare(runs, "loss")}
    return _save(folder, "fig3", figure, numbers)


def fig4(folder: Path, scale: Scale) -> dict:
    """Text and image loss of the twins; perplexity is its exponential, on the right axis."""
    runs = _twins(folder, scale)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, modality in zip(axes, ("text", "image"), strict=True):
        _draw_twins(axis, runs, f"loss/{modality}")
        axis.set(xlabel="tokens", ylabel=f"{modality} loss (nats, {SMOOTHED})")
        perplexity = axis.secondary_yaxis("right", functions=(np.exp, lambda p: np.log(np.maximum(p, 1e-9))))
        perplexity.set_ylabel("perplexity")
        perplexity.yaxis.set_major_locator(LogLocator())
        perplexity.yaxis.set_major_formatter("{x:g}")
    keys = ["loss/text", "loss/image"]
    first = {key: _compare(runs, key, at=0) for key in keys}
    numbers = {"curves": _curves(runs, keys), "held_out_first": first}
    numbers["held_out_last"] = {key: _compare(runs, key) for key in keys}
    last = next(iter(runs.values()))[0].training[-1]
    numbers["image_tokens_for_a_text_token"] = last["tokens/image"] / last["tokens/text"]
    return _save(folder, "fig4", figure, numbers)


def table1(folder: Path, scale: Scale) -> dict:
    """Completions before and after, the few-shot probe, and held-out text perplexity: last, and through training."""
    numbers, runs = _json(folder / "table1.probe.json"), _twins(folder, scale)
    figure, axis = plt.subplots(figsize=(6, 4))
    numbers["held_out_text_perplexity"] = {}
    for start, records in runs.items():
        points = records[0].validation("ppl/text", "valid_text")
        axis.plot(*zip(*points, strict=True), "o-", markersize=3, color=COLOURS[start], label=start)
        numbers["held_out_text_perplexity"][start] = points
    axis.axhline(
        numbers["models"][0]["perplexity"],
        color="grey",
        linestyle=":",
        label="the language model itself, text ids alone",
    )
    axis.set(xlabel="step of text-to-image training", ylabel="perplexity of held-out text (all ids)", yscale="log")
    axis.legend()
    return _save(folder, "table1", figure, numbers)


def fig5(folder: Path, scale: Scale) -> dict:
    """Pictures of the twins for the same prompts and seeds beside the true ones, and the distances of all seeds."""
    names = [f"{start}-{scale.seeds[0]}" for start in ("pretrained", "random")]
    listings = {name: _lines(folder / "samples" / name / "samples.jsonl") for name in names}
    reference = _lines(folder / "reference.jsonl")
    figure, axes = plt.subplots(SOURCES, SHOWN, figsize=(1.4 * SHOWN, 1.6 * SOURCES), squeeze=False)
    for column, true in enumerate(reference[:SHOWN]):
        pictures = [("true", Path(true["file"]))]
        pictures += [(name, folder / "samples" / name / listings[name][column]["file"]) for name in names]
        for row, (name, path) in enumerate(pictures):
            axis = axes[row][column]
            axis.imshow(np.asarray(Image.open(path)))
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            if column == 0:
                axis.set_ylabel(name)
            if row == 0:
                axis.set_title(true["prompt"][:22], fontsize=6)
    results = {arm.name: _json(folder / "fid" / f"{arm.name}.json") for arm in twins(scale)}
    distances = {
        start: [results[f"{start}-{seed}"]["fid"] for seed in scale.seeds] for start in ("pretrained", "random")
    }
    numbers = {"results": results, "fid": paired(distances["pretrained"], distances["random"])}
    # prompts are captions of training pictures on one machine: who has them by heart draws them better
    numbers["training_image_loss"] = {
        start: [record.recent("loss/image") for record in records] for start, records in _twins(folder, scale).items()
    }
    return _save(folder, "fig5", figure, numbers)


def fig6(folder: Path, scale: Scale) -> dict:
    """Image-only training: loss against tokens of both starts and of the selectively tuned ones."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    numbers: dict = {"curves": {}, "held_out_image_loss": {}, "trained_parameters": {}}
    for arm in image_only(scale):
        record = _record(folder, arm)
        whole = arm.name.rpartition("-")[2].isdigit()
        if not whole or arm.name.endswith(f"-{scale.seeds[0]}"):
            name, style = arm.name.removeprefix("image-"), "-" if whole else "--"
            axis.plot(record.tokens(), record.curve("loss/image"), style, label=name)
        numbers["curves"][arm.name] = _points(record, "loss/image")
        numbers["held_out_image_loss"][arm.name] = record.last("loss/image")
        environment = _json(folder / "runs" / arm.name / "environment.json")
        numbers["trained_parameters"][arm.name] = environment["parameters_trained"]
    losses = numbers["held_out_image_loss"]
    starts = {start: [losses[f"image-{start}-{seed}"] for seed in scale.seeds] for start in ("pretrained", "random")}
    numbers["whole"] = paired(starts["pretrained"], starts["random"])
    numbers["selective"] = {selective_name(policy): losses[selective_name(policy)] for policy in POLICIES}
    axis.set(xlabel="tokens", ylabel=f"image loss (nats, {SMOOTHED})")
    axis.legend(fontsize=7)
    return _save(folder, "fig6", figure, numbers)


def fig7(folder: Path, scale: Scale) -> dict:
    """Contrastive alignment: its loss and temperature, nearest text tokens, and training that begins with it."""
    folders = [folder / "runs" / f"{ALIGNMENT}-{seed}" for seed in scale.seeds]
    alignment, found = Record.read(folders[0]), [_json(one / "nearest_tokens.json") for one in folders]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for axis, key in zip(axes, ("loss", "temperature"), strict=False):
        axis.plot([line["step"] for line in alignment.training], [line[key] for line in alignment.training])
        axis.set(xlabel="step", ylabel=f"contrastive {key}")
    starts = {start: [Record.read(folder / "runs" / f"{start}-{seed}") for seed in scale.seeds] for start in COLOURS}
    for start, (record, *_) in starts.items():
        axes[2].plot(record.tokens(), record.curve("loss/image"), color=COLOURS[start], label=start)
    axes[2].set(xlabel="tokens", ylabel=f"image loss (nats, {SMOOTHED})")
    axes[2].legend()
    last = {start: [record.last("loss/image") for record in records] for start, records in starts.items()}
    numbers = {
        "loss": [line["loss"] for line in alignment.training],
        "temperature": [line["temperature"] for line in alignment.training],
        "nearest_tokens": found[0]["nearest_tokens"]["aligned"],
        "control": found[0]["nearest_tokens"]["shuffled"],
        "word_like": [one["word_like"] for one in found],
        "retrieval": [one["retrieval"] for one in found],
        "held_out_image_loss": last,
        "against_pretrained": paired(last["aligned"], last["pretrained"]),
        "against_random": paired(last["aligned"], last["random"]),
        "curves": {start: _points(records[0], "loss/image") for start, records in starts.items()},
    }
    return _save(folder, "fig7", figure, numbers)


def sweep_table(folder: Path, scale: Scale) -> dict:
    """The remark on learning rates and batches: held-out losses after the same number of tokens."""
    rows = []
    for arm in sweep(scale):
        record = _record(folder, arm)
        lr, batch = max(line["lr"] for line in record.training), arm.settings[2].partition("=")[2]
        losses = {key: record.last(key) for key in ("loss", "loss/text", "loss/image")}
        rows.append({"run": arm.name, "lr": lr, "batch": int(batch), "tokens": record.tokens()[-1], **losses})
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for batch in sorted({row["batch"] for row in rows}):
        points = sorted((row["lr"], row["loss"]) for row in rows if row["batch"] == batch)
        axis.plot(*zip(*points, strict=True), "o-", label=f"batch of {batch} sequences")
    axis.set(xlabel="peak learning rate", ylabel="held-out loss (nats)", xscale="log")
    axis.legend()
    return _save(folder, "sweep", figure, {"rows": rows, "usual_batch": scale.batch})


MAKERS: dict[str, Callable[[Path, Scale], dict]] = {
    "fig3": fig3, "fig4": fig4, "table1": table1, "fig6": fig6, "fig7": fig7, "fig5": fig5, "sweep": sweep_table
}  # fmt: skip


def _record(folder: Path, arm: Arm) -> Record:
    return Record.read(folder / "runs" / arm.name)


def _twins(folder: Path, scale: Scale) -> dict[str, list[Record]]:
    records: dict[str, list[Record]] = {"pretrained": [], "random": []}
    for arm in twins(scale):
        records[arm.name.split("-")[0]].append(_record(folder, arm))
    return records


def _draw_twins(axis, runs: dict[str, list[Record]], key: str, exponential: bool = False) -> None:
    """The mean of the seeds as a line and their range as a band."""
    for start, records in runs.items():
        curves = np.array([record.curve(key) for record in records])
        curves = np.exp(curves) if exponential else curves
        tokens = records[0].tokens()
        axis.plot(tokens, curves.mean(axis=0), color=COLOURS[start], label=f"{start}, {len(records)} seeds")
        axis.fill_between(tokens, curves.min(axis=0), curves.max(axis=0), color=COLOURS[start], alpha=0.25)
    axis.legend()


def _points(record: Record, key: str) -> dict[str, list]:
    return {"tokens": thinned(record.tokens()), key: thinned(record.curve(key))}


def _curves(runs: dict[str, list[Record]], keys: list[str]) -> dict[str, dict]:
    return {
        record.name: {"tokens": thinned(record.tokens()), **{key: thinned(record.curve(key)) for key in keys}}
        for records in runs.values()
        for record in records
    }


def _compare(runs: dict[str, list[Record]], key: str, at: int = -1) -> dict:
    """Held-out values of the pre-trained (first) and random (second) models, paired by seed."""
    values = {start: [record.validation(key)[at][1] for record in records] for start, records in runs.items()}
    return {"step": runs["random"][0].validation(key)[at][0], **paired(values["pretrained"], values["random"])}


def _json(path: Path) -> dict:
    if not path.exists():
        raise MissingRun(f"{path} is absent: run this experiment first")
    return json.loads(path.read_text())


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        raise MissingRun(f"{path} is absent: run this experiment first")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _save(folder: Path, name: str, figure, numbers: dict) -> dict:
    figure.tight_layout()
    for ending in ("png", "svg"):
        content = io.BytesIO()
        figure.savefig(content, format=ending, metadata={"Date": None} if ending == "svg" else None)
        write_file(folder / f"{name}.{ending}", content.getvalue())
    plt.close(figure)
    write_file(folder / f"{name}.json", (json.dumps(numbers, indent=1) + "\n").encode())
    return numbers
