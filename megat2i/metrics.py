"""The record of a run: one JSON object a step in ``metrics.jsonl`` and the same keys on TensorBoard."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megat2i import drawn
from megat2i.files import DataFileError, write_file
from megat2i.progress import say
from megat2i.record_file import RecordFile
from megat2i.vocab import MODALITIES

# Dense bfloat16 peak in FLOP/s by the vendor's data sheets, matched on the device's name.
PEAK_FLOPS = {  # the first key that is part of the name counts
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device in ``dtype``; None where it is not known (CPUs, and everything but bfloat16)."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


@dataclass(frozen=True)
class StepMetrics:
    """What one step or one validation pass measured over the whole global batch.

    ``nll``, ``correct``, ``off_range`` (probability given to ids of the other range) and ``counts`` [3]: sums over the
    positions of each modality; ``weights`` [3] of the objective.
    """

    nll: Tensor
    correct: Tensor
    off_range: Tensor
    counts: Tensor
    weights: tuple[float, float, float]

    @property
    def loss(self) -> float:
        """Unweighted mean over all positions."""
        return sum(self.nll.tolist()) / sum(self.counts.tolist())

    def as_dict(self) -> dict[str, float | int | None]:
        """``loss`` is the unweighted mean over all positions; a modality without positions reports null.

        ``objective``, where the weights differ, is their weighted mean; neither includes the z-loss.
        """
        nll, counts = self.nll.tolist(), self.counts.tolist()
        result: dict[str, float | int | None] = {"loss": self.loss}
        if len(set(self.weights)) > 1:
            normaliser = sum(w * count for w, count in zip(self.weights, counts, strict=True))
            total = sum(w * value for w, value in zip(self.weights, nll, strict=True))
            result["objective"] = total / normaliser if normaliser else None
        for index, modality in enumerate(MODALITIES):
            mean = nll[index] / counts[index] if counts[index] else None
            result[f"loss/{modality}"] = mean
            if modality != "special":
                result[f"ppl/{modality}"] = None if mean is None else math.exp(min(mean, 700.0))
                for name, sums in (("accuracy", self.correct), ("off_range", self.off_range)):
                    result[f"{name}/{modality}"] = sums[index].item() / counts[index] if counts[index] else None
            result[f"tokens/{modality}"] = counts[index]
        return result


class MetricsLog:
    """Writes ``metrics.jsonl``, drawn pictures and TensorBoard events in the run folder; on the first rank only."""

    def __init__(self, run_dir: Path, resume_step: int, fence: Callable[[], None] = lambda: None):
        self.path, self._fence = run_dir / "metrics.jsonl", fence
        self._begin_after(resume_step)

    def _begin_after(self, step: int) -> None:
        run_dir = self.path.parent
        if self.path.exists():
            self._keep_steps_up_to(step)
        drawn.remove_steps_after(run_dir, step)
        self._file = RecordFile(self.path)
        self._failed: set[str] = set()  # what is not written any more
        before = set(threading.enumerate())
        with self._goes_on_without("TensorBoard"):
            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        _say_nothing_of_errors_in(set(threading.enumerate()) - before)

    def go_back(self, step: int) -> None:
        """Drop what was logged after ``step``: those steps are done again."""
        self.close()
        self._begin_after(step)

    def _keep_steps_up_to(self, step: int) -> None:
        """Drop what a stopped run logged after its last checkpoint: those steps are done again."""
        kept = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                number = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError):
                continue  # the line that was being written when the run was killed, or one that the disk lost
            if number <= step:
                kept.append(line + "\n")
        write_file(self.path, "".join(kept).encode())

    def write(self, entry: dict) -> None:
        """Append one object; it needs ``step``. Numbers go to TensorBoard under the same key.

        ``fence`` comes first: it ends the process where the folder is another launch's by now.
        """
        self._fence()
        self._file.append(json.dumps({key: _finite(value) for key, value in entry.items()}))
        prefix = f"{entry['split']}/" if "split" in entry else ""
        if "TensorBoard" in self._failed:
            return
        with self._goes_on_without("TensorBoard"):
            for key, value in entry.items():
                if key not in ("step", "split") and isinstance(value, int | float):
                    self.tensorboard.add_scalar(prefix + key, value, entry["step"])

    def images(self, step: int, images: np.ndarray, prompts: list[str]) -> None:
        """Keep generated ``images`` [B, 3, H, W] uint8 in RUN/drawn, and show each on TensorBoard under its prompt."""
        with self._goes_on_without(f"pictures of step {step:,}"):
            drawn.save_step(self.path.parent, step, images, prompts)
        if "TensorBoard" in self._failed:
            return
        with self._goes_on_without("TensorBoard"):
            for image, prompt in zip(images, prompts, strict=True):
                self.tensorboard.add_image(f"samples/{prompt}", image, step)

    def sync(self) -> None:
        """Bring every line to the disk, as far as it takes them."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        if "TensorBoard" not in self._failed:
            with self._goes_on_without("TensorBoard"):
                self.tensorboard.close()

    @contextmanager
    def _goes_on_without(self, what: str) -> Iterator[None]:
        """Storage that fails in the block, such as a full disk, costs ``what``, and does not end the training."""
        try:
            yield
        except (OSError, DataFileError) as error:
            reason = error.problem if isinstance(error, DataFileError) else error.strerror
            say(f"{self.path.parent}: the run goes on without {what} ({reason})")
            self._failed.add(what)


def _say_nothing_of_errors_in(threads: set[threading.Thread]) -> None:
    """TensorBoard's thread hands its error to the next call, which says it; its traceback is not wanted."""
    usual = threading.excepthook

    def hook(args):
        if args.thread not in threads:
            usual(args)

    threading.excepthook = hook


def _finite(value):
    """JSON has no NaN and no infinity: such a number is written as its name, which no reader mistakes for a value."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
