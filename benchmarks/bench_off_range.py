"""How fast mode "certified" of the loss head becomes usable in training, and what it changes in the loss.

    python benchmarks/bench_off_range.py [--json FILE] [--minutes M] [--data openmoji synthetic] [--steps N]
        [--config FILE] [section.key=value ...]

"openmoji" is the demo's run, where data/openmoji exists; "synthetic" trains ``--config`` (a GPU: the paper's 1B) on
captions that name the pattern of their image's codes. Each is trained three times on the same rows from the same
weights: exact; exact with one weight changed by a hundredth, which says how far runs drift apart by themselves; and
certified with delta = 1e-3. Of every step: losses, off-range mass (the probability that a position gives to the other
modality), the share of row tiles in which no position gives more than delta, and the share of the two gradient products
that certified mode must compute. The first run takes a third of the minutes; the others take as many steps.
"""

import dataclasses
import gc
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from bench_step import set_initial_weights
from harness import OUT_OF_TIME, ROOT, Record, failure, parser_for
from torch import Tensor

from megat2i import config
from megat2i.config import Config
from megat2i.data.batches import TrainingData
from megat2i.data.indexed import IndexedWriter
from megat2i.data.sizes import with_data_sizes
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.kernels import choose_ops
from megat2i.kernels.linear_cross_entropy.tokens import ROW_TILE
from megat2i.loss import ModalityLoss
from megat2i.model.gpt import GPT
from megat2i.optim.schedule import learning_rate
from megat2i.optim.torch_engine import TorchEngine
from megat2i.pipeline import Pipeline
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import train_step

DELTA = 1e-3
USABLE = 0.9  # share of tiles from which on mode "certified" pays
DOCUMENTS, PATTERNS = 4_096, 64
POINTS = 100  # of a curve in the record


class Watched:
    """The loss head in ``mode``, which remembers of the last step what each tile would let certified mode leave out."""

    def __init__(self, head, mode: str):
        self.head, self.seen = partial(head, mode=mode, delta=DELTA), []

    def __call__(self, hidden, weight, targets, *, ranges, live=None, **options):
        losses = self.head(hidden, weight, targets, ranges=ranges, live=live, **options)
        if live is None:  # on a CPU the head takes positions as they stand; a GPU's grouping is what is asked here
            modality = sum((targets >= start).long() for start, _ in ranges)
            order = modality.argsort(stable=True)[(targets < 0).sum() :]
        else:
            order = live.order
        self.seen.append(tiles(losses.off_range_mass[order], targets[order].masked_fill(order < 0, -1), ranges))
        return losses

    def take(self) -> tuple[float, float]:
        """(share of tiles below delta, share of the gradient products to compute) since the last call."""
        seen, self.seen = torch.stack(self.seen).mean(dim=0), []
        return tuple(seen.tolist())


@torch.no_grad()
def tiles(mass: Tensor, targets: Tensor, ranges) -> Tensor:
    """[2] of rows in the head's order: the share of tiles whose positions all are below delta, the work to be done."""
    mass, targets = (
        torch.nn.functional.pad(t, (0, -len(t) % ROW_TILE), value=v) for t, v in ((mass, 0), (targets, -1))
    )
    above = ((mass > DELTA) & (targets >= 0)).view(-1, ROW_TILE).any(dim=1)
    filled = (targets >= 0).view(-1, ROW_TILE).any(dim=1)
    kept = [((targets >= start) & (targets < stop)).view(-1, ROW_TILE).any(dim=1) | above for start, stop in ranges]
    widths = [stop - start for start, stop in ranges]
    work = sum(kept_by * width for kept_by, width in zip(kept, widths, strict=True)) / sum(widths)
    return torch.stack([(filled & ~above).sum(), work[filled].sum()]).double() / filled.sum()


def main() -> None:
    """Every data set."""
    cuda, parser = torch.cuda.is_available(), parser_for(__doc__)
    parser.add_argument("--data", nargs="*", choices=("openmoji", "synthetic"), default=["openmoji", "synthetic"])
    parser.add_argument("--config", default=str(ROOT / f"configs/{'open_lm_1b_t2i' if cuda else 'openmoji_demo'}.yaml"))
    parser.add_argument("--steps", type=int, default=2_000, help="at most, of each run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the synthetic run")
    arguments = parser.parse_intermixed_args()
    if cuda:
        size = ["training.global_batch_size=32", "training.micro_batch_size=16", "training.warmup_steps=50"]
        arguments.overrides = [*size, *arguments.overrides]
    settings = config.load(arguments.config, arguments.overrides)
    backend = Backend.resolve(settings)
    backend.start(seed=0)
    record, groups = (
        Record("off_range", arguments.json, backend.device, arguments.minutes),
        ParallelGroups.create(settings.parallel),
    )
    share = record.left() / len(arguments.data) / 3
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.data:
            try:
                chosen = synthetic(settings, Path(folder)) if name == "synthetic" else openmoji()
                rows = {"skipped": chosen} if isinstance(chosen, str) else None
                rows = {name: rows} if rows else compare(chosen, backend, groups, arguments.steps, share, record)
            except Exception as error:  # the other data set still has its turn
                rows = {name: failure(error)}
            for run, row in rows.items():
                print(f"{name}, {run}: {json.dumps({k: v for k, v in row.items() if k != 'curve'})}", flush=True)
            record.add(name, rows)
    dist.destroy_process_group()
    record.finish()


def openmoji() -> Config | str:
    """The demo's configuration, or why it cannot be trained here."""
    settings = config.load(ROOT / "configs/openmoji_demo.yaml")
    data = [dataclasses.replace(dataset, prefix=str(ROOT / dataset.prefix)) for dataset in settings.data.train]
    if not Path(f"{data[0].prefix}.idx").exists():
        return f"{settings.data.train[0].prefix} is absent: tools/demo.py makes it"
    return with_data_sizes(
        dataclasses.replace(settings, data=dataclasses.replace(settings.data, train=data, valid=None))
    )


def synthetic(settings: Config, folder: Path) -> Config:
    """``settings`` on captions whose first token says which pattern the codes have, with noise in both."""
    vocab, length = settings.vocab, settings.data.sequence_length
    generator = np.random.default_rng(0)
    captions, codes = (length * 3 // 100, length * 88 // 100)
    patterns = generator.integers(0, vocab.image_codes, (PATTERNS, codes))
    with IndexedWriter(folder / "train", np.uint16) as writer:
        for _ in range(DOCUMENTS):
            kind = generator.integers(PATTERNS)
            words = generator.zipf(1.3, max(1, captions)) % vocab.text_tokens
            image = np.where(
                generator.random(codes) < 0.5, patterns[kind], generator.integers(0, vocab.image_codes, codes)
            )
            writer.add_document([np.array([kind, *words], np.uint16), image.astype(np.uint16)], [0, 1])
    data = dataclasses.replace(settings.data, train=[config.DatasetConfig(str(folder / "train"))], mode="text_to_image")
    return dataclasses.replace(settings, data=data)


def compare(settings: Config, backend: Backend, groups: ParallelGroups, steps: int, share: float, record: Record):
    """Rows: each run's curve, and what the certified run's loss differs from the exact one's."""
    rows, curves, until = {}, {}, time.monotonic() + share
    for name, mode, nudge in (("exact", "exact", False), ("nudged", "exact", True), ("certified", "certified", False)):
        if record.left() < 0:
            rows[name] = OUT_OF_TIME
            continue
        curve = curves[name] = run(settings, backend, groups, mode, nudge, steps, until)
        steps, until = min(steps, len(curve)), max(until, time.monotonic() + 1.2 * share)
        usable = next((entry["step"] for entry in curve if entry["tiles_below"] >= USABLE), None)
        every = max(1, len(curve) // POINTS)
        rows[name] = {"steps": len(curve), f"step with {USABLE:.0%} of tiles": usable, "curve": curve[::every]} | {
            f"last {key}": curve[-1][key]
            for key in ("loss", "off_range/text", "off_range/image", "tiles_below", "work")
        }
        gc.collect()
        if backend.device.type == "cuda":
            torch.cuda.empty_cache()
    for name in ("nudged", "certified"):
        if name in curves:
            pairs = zip(curves[name], curves["exact"], strict=False)
            gaps = np.array([one["loss"] - other["loss"] for one, other in pairs])
            rows[name] |= {"mean gap of the loss": gaps.mean(), "mean size of the gap": np.abs(gaps).mean()}
            rows[name] |= {"mean gap in the last quarter": gaps[-max(1, len(gaps) // 4) :].mean()}
    return rows


def run(settings, backend: Backend, groups, mode: str, nudge: bool, steps: int, until: float) -> list[dict]:
    """One entry a step, of at most ``steps``, until the clock says ``until``."""
    dataset = T2IDataset(
        settings.data.train[0].prefix, settings.vocab_layout, settings.data.sequence_length,
        mode=settings.data.mode, seed=settings.data.seed, caption_dropout=settings.data.caption_dropout,
    )  # fmt: skip
    training = settings.training
    data = TrainingData([(dataset, 1.0)], settings.data.seed, training.global_batch_size)
    ops = choose_ops(backend.device, backend.dtype)
    head = Watched(ops.linear_cross_entropy, mode)
    ops = dataclasses.replace(ops, linear_cross_entropy=head)
    model = GPT.empty(settings.model, settings.vocab_layout, ops, backend.device, backend.dtype)
    set_initial_weights(model)
    if nudge:
        with torch.no_grad():
            model.output.weight[settings.vocab_layout.image_start, 0] *= 1.01
    engine, pipeline = TorchEngine(model, settings.optimizer, training, groups), Pipeline(model, groups)
    loss, curve = ModalityLoss((settings.loss.text, settings.loss.image, settings.loss.special)), []
    while len(curve) < min(steps, training.steps) and (time.monotonic() < until or not curve):
        batches = [b.to(backend.device) for b in data.micro_batches(len(curve), 0, 1, training.micro_batch_size)]
        lr = learning_rate(len(curve), settings.optimizer, training)
        metrics = train_step(pipeline, engine, batches, loss, groups, lr)[0].as_dict()
        below, work = head.take()
        kept = ("loss", "loss/text", "loss/image", "off_range/text", "off_range/image")
        curve.append({"step": len(curve) + 1} | {key: metrics[key] for key in kept})
        curve[-1] |= {"tiles_below": below, "work": work}
    return curve


if __name__ == "__main__":
    main()
