"""What the first rank says while a run trains: the bar, held-out losses, whether it overfits, and how it ended."""

import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megat2i.progress import Progress, count, say

RECENT = 50  # steps whose mean is the training loss that stands beside a held-out loss
MARGIN = 0.05  # share by which a held-out loss must be above its best to be more than noise
MODALITIES = ("text", "image")
SAMPLES = 8  # of a step with a spike, that are named
REMEDY = "train for fewer steps, on more data, or a smaller model"


@dataclass(frozen=True)
class Validation:
    """Losses of one modality at a validation: held out, and in training over the RECENT steps before it."""

    step: int
    held_out: float
    training: float


class Updates:
    """Steps without an update, and loss spikes, of a run so far."""

    def __init__(self):
        self.steps = self.not_finite = self.spikes = self.refused = self.rewinds = 0
        self._spiking = False

    def add(self, entry: dict) -> str | None:
        """Take the record of a step; returns a sentence where a spike begins, or one more step was not finite.

        Of the latter, where their number is a power of two.
        """
        spike, skipped = entry.get("spike", 0), entry.get("skipped", 0)
        begins, self._spiking = spike and not self._spiking, bool(spike)
        self.steps += 1
        self.spikes += spike
        self.refused += spike and skipped
        self.not_finite += skipped and not spike
        self.rewinds += "rewound_from" in entry
        if begins:
            return spike_in_words(entry)
        if skipped and not spike and self.not_finite.bit_count() == 1:
            so_far = count(self.not_finite, "such step")
            return f"step {entry['step']:,}: the gradient is not finite, so the update is skipped ({so_far} so far)"
        return None

    def summary(self) -> list[str]:
        """What there is to say of them at the end."""
        lines = []
        if self.not_finite:
            lines.append(f"{self.not_finite:,} of {self.steps:,} updates were skipped: the gradient was not finite")
        if self.spikes:
            refused = f"; updates skipped for that: {self.refused:,}" if self.refused else ""
            lines.append(f"{self.spikes:,} of {self.steps:,} steps had a loss spike{refused}")
        if self.rewinds:
            times = count(self.rewinds, "time")
            lines.append(f"the run went back before a spike {times}: see rewound_from in metrics.jsonl")
        return lines


class Losses:
    """The losses of a run so far. ``modality``: the one that is watched for overfitting."""

    def __init__(self, modality: str):
        self.modality = modality
        self.held_out: dict[str, dict] = {}  # the newest record of each split
        self.best: Validation | None = None
        self.overfitting = False
        self._recent: deque[dict] = deque(maxlen=RECENT)
        self.updates = Updates()

    def restore(self, metrics: Path) -> None:
        """Take over the records of the launches before this one."""
        for line in metrics.read_text().splitlines() if metrics.exists() else ():
            self.add(json.loads(line))

    def add(self, entry: dict) -> str | None:
        """Take one record of ``metrics.jsonl``; returns a sentence where it shows overfitting, a spike or the like."""
        if "split" not in entry:
            self._recent.append(entry)
            return self.updates.add(entry)
        self.held_out[entry["split"]] = entry
        found, training = entry.get(f"loss/{self.modality}"), self.training().get(self.modality)
        if entry["split"] != "valid" or not isinstance(found, float) or training is None:
            return None
        now, began = Validation(entry["step"], found, training), not self.overfitting
        if self.best is None or now.held_out <= self.best.held_out:
            self.best = now
        higher = now.held_out > self.best.held_out * (1 + MARGIN)
        self.overfitting = higher and now.training < self.best.training
        return self.remark(now) if self.overfitting and began else None

    def training(self) -> dict[str, float]:
        """Mean loss of each modality over the last steps; one that was not trained, or not finite, is missing."""
        found = {}
        for modality in MODALITIES:
            values = [entry.get(f"loss/{modality}") for entry in self._recent]
            values = [value for value in values if isinstance(value, float)]
            if values:
                found[modality] = sum(values) / len(values)
        return found

    def remark(self, now: Validation) -> str:
        """The sentence on overfitting."""
        return (
            f"the run overfits: its held-out {self.modality} loss is {now.held_out:.3f} at step {now.step:,}, above "
            f"its best, {self.best.held_out:.3f} at step {self.best.step:,}, while the training loss fell from "
            f"{self.best.training:.3f} to {now.training:.3f}; {REMEDY}"
        )

    def summary(self) -> list[str]:
        """The last losses, a line for training and one for each split, and the remark where the run overfits."""
        recent = len(self._recent)
        lines = [f"training loss, mean of the last {recent} steps: {in_words(self.training())}"] if recent else []
        for split, entry in self.held_out.items():
            lines.append(f"{name_of(split)} loss at step {entry['step']:,}: {in_words(losses_of(entry))}")
        if self.overfitting:
            entry = self.held_out["valid"]
            now = Validation(entry["step"], entry[f"loss/{self.modality}"], self.training()[self.modality])
            lines.append(self.remark(now))
        return lines + self.updates.summary()


class Console:
    """Speaks for a run of ``steps`` steps, of which this launch does ``first_step`` + 1 to ``last_step``."""

    def __init__(self, run_dir: Path, mode: str, first_step: int, last_step: int, steps: int):
        self.run_dir, self.last_step, self.steps = run_dir, last_step, steps
        self.modality = "text" if mode == "text_only" else "image"
        self._began = time.monotonic()
        self._begin_after(first_step)

    def _begin_after(self, step: int) -> None:
        self.losses = Losses(self.modality)
        self.losses.restore(self.run_dir / "metrics.jsonl")
        self._bar = Progress(self.last_step, "training", "steps", step)

    def go_back(self, step: int) -> None:
        """Forget the steps after ``step``, which are done again; ``metrics.jsonl`` has none of them any more."""
        self._bar.close()
        self._begin_after(step)

    def step(self, entry: dict) -> None:
        """Take the record of a training step."""
        remark, skipped = self.losses.add(entry), self.losses.updates.not_finite + self.losses.updates.refused
        note = f"{in_words(losses_of(entry))}, {entry['tokens_per_s']:,.0f} tokens/s"
        self._bar.note(note + (f", {count(skipped, 'update')} skipped" if skipped else ""))
        self._bar.update()
        if remark:
            say(remark)

    def doing(self, what: str) -> None:
        """Say beside the bar what happens between two steps."""
        self._bar.note(what)

    def held_out(self, entry: dict) -> None:
        """Say the losses of a validation, and that the run overfits where it begins to."""
        remark = self.losses.add(entry)
        losses = in_words(losses_of(entry))
        training = in_words(self.losses.training())
        say(f"step {entry['step']:,}: {name_of(entry['split'])} loss {losses} (training: {training})")
        if remark:
            say(remark)

    def close(self) -> None:
        """End the bar, also where an error ends the run."""
        self._bar.close()

    def end(self) -> None:
        """Say how the run ended and where it is."""
        self.close()
        seconds = tqdm.format_interval(time.monotonic() - self._began)
        ended = "finished" if self.last_step == self.steps else "stopped"
        say(f"{ended} after step {self.last_step:,} of {self.steps:,}, in {seconds}: the run is in {self.run_dir}")
        for line in self.losses.summary():
            say(line)


def spike_in_words(entry: dict) -> str:
    """The sentence on the record of a step whose loss is a spike."""
    loss, norm = float(entry["loss"]), float(entry["grad_norm"])  # "nan" where it was read from a file
    skipped = ", and the update is skipped" if entry["skipped"] else ""
    samples = [":".join(map(str, sample)) for sample in entry["samples"][:SAMPLES]]
    more = len(entry["samples"]) - len(samples)
    rows = f"; its samples (dataset:epoch:row) are {', '.join(samples)}" if samples else ""
    rest = f" and {more:,} more, see metrics.jsonl" if more else ""
    return (
        f"step {entry['step']:,}: the loss spikes to {loss:,.3f} from {entry['usual_loss']:.3f} on average, with a "
        f"gradient norm of {norm:,.3f}{skipped}{rows}{rest}"
    )


def name_of(split: str) -> str:
    """A validation split in words."""
    return {"valid": "held-out", "valid_text": "held-out text-only"}.get(split, split)


def losses_of(entry: dict) -> dict[str, float | str]:
    """Loss of each modality that a record has one of."""
    found = {modality: entry.get(f"loss/{modality}") for modality in MODALITIES}
    return {modality: value for modality, value in found.items() if value is not None}


def in_words(losses: dict[str, float | str]) -> str:
    """Losses as "text 3.210, image 4.560"; one that is not finite by its name."""
    return ", ".join(f"{m} {v:.3f}" if isinstance(v, float) else f"{m} {v}" for m, v in losses.items()) or "none"
