"""The demo's record and its curves: losses and perplexities of both modalities from ``metrics.jsonl`` alone."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from megat2i.files import DataFileError

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the choice of a backend without a display)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

SMOOTHING = 0.95  # of the plotted training curves
COLORS = {"text": "tab:blue", "image": "tab:orange", "total": "black"}
PANELS = {"loss": ("loss (nats)", "linear"), "ppl": ("perplexity", "log")}
PANEL_SIZE = (6.0, 4.5)  # inches
DPI = 110


@dataclass(frozen=True)
class Record:
    """Lines of ``metrics.jsonl``: every training step, and the validations of the held-out pictures."""

    train: list[dict]
    valid: list[dict]


def read_record(folder: Path) -> Record:
    """The record of a run; raises DataFileError where it has no step."""
    path = folder / "metrics.jsonl"
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataFileError(path, f"not readable as lines of JSON ({error})", "Train the run first") from error
    train = [entry for entry in entries if "split" not in entry]
    if not train:
        raise DataFileError(path, "holds no training step", "Train the run first")
    return Record(train, [entry for entry in entries if entry.get("split") == "valid"])


def curves_png(record: Record, title: str) -> bytes:
    """Losses and perplexities beside each other."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(PANEL_SIZE[0] * len(PANELS), PANEL_SIZE[1]))
    for axis, quantity in zip(axes, PANELS, strict=True):
        plot(axis, record, quantity)
    figure.suptitle(f"{title}: thin: each step, thick: moving average ({SMOOTHING})")
    return _png(figure)


def panel_png(record: Record, quantity: str) -> bytes:
    """One of PANELS alone, for narrow screens."""
    figure, axis = plt.subplots(figsize=PANEL_SIZE)
    plot(axis, record, quantity)
    return _png(figure)


def plot(axis: Axes, record: Record, quantity: str) -> None:
    """Draw the curves of ``quantity`` ("loss" or "ppl") of text, image and all positions."""
    label, scale = PANELS[quantity]
    for name, color in COLORS.items():
        steps = [entry["step"] for entry in record.train]
        values = [value(entry, quantity, name) for entry in record.train]
        axis.plot(steps, values, color=color, alpha=0.15, linewidth=0.8)
        axis.plot(steps, smoothed(values), color=color, label=name)
        if record.valid:
            steps = [entry["step"] for entry in record.valid]
            values = [value(entry, quantity, name) for entry in record.valid]
            axis.plot(steps, values, "o--", color=color, markersize=4, label=f"{name}, held out")
    axis.set(xlabel="step", ylabel=label, yscale=scale)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def value(entry: dict, quantity: str, name: str) -> float:
    """``quantity`` ("loss" or "ppl") of a modality, or of all positions ("total"), in one line of the record."""
    if name != "total":
        return float(entry[f"{quantity}/{name}"])  # a number that is not finite is written as its name
    loss = float(entry["loss"])
    return loss if quantity == "loss" else float(np.exp(loss))


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias of its start."""
    average, weight, result = 0.0, 0.0, []
    for number in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * number
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(average / weight)
    return result


def _png(figure: Figure) -> bytes:
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    plt.close(figure)
    return content.getvalue()
