"""The parity grid's parts: layouts and variants of the model, what the ranks record of a few steps, the comparison.

Two optimizers, three steps each, both through the real engines. "adamw": with clipping at work. "sgd": AdamW in the
limit where it is plain SGD (beta1 = 0, and an eps so large that the second moment does not count), without clipping:
its first moment is the reduced gradient itself, and an update is linear in it, which AdamW's is not.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megat2i.config import Config, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig, VocabConfig
from megat2i.config_limits import CHOICES
from megat2i.loss import ModalityLoss
from megat2i.optim.engine import EXP_AVG
from megat2i.parallel.shard import Shard
from megat2i.trainer import train_step

STEPS = 3
ROWS = 16  # of the global batch
SGD_EPS = 1e6
OPTIMIZERS = {  # (settings, learning rate)
    "sgd": (OptimizerConfig(beta1=0.0, beta2=0.5, eps=SGD_EPS, weight_decay=0.0, clip=0.0), 0.3 * SGD_EPS),
    # eps is large so that updates are smooth in the gradient: else the sign of rounding noise decides some of them
    "adamw": (OptimizerConfig(eps=1e-3, weight_decay=0.1, clip=0.5), 1e-2),
}
MODEL = ModelConfig(hidden=32, layers=8, heads=8, ffn=64, qk_norm=True, positions="rotary")
VARIANTS = {
    "layer_norm": (MODEL, LossConfig(z_loss=1e-3)),
    "gain_only": (replace(MODEL, norm="layer_norm_gain_only"), LossConfig(text=0.5, image=2.0)),
    "rms_norm": (replace(MODEL, norm="rms_norm"), LossConfig(text=0.3, image=2.0, special=0.0, z_loss=1e-3)),
    "released": (replace(MODEL, qk_norm=False, positions="none"), LossConfig()),  # the shape of open_lm's released 1B
}
AXES = {
    "pipeline": (1, 2, 4),
    "tensor": (1, 2, 4),
    "data": (1, 2, 4),
    "sequence": (False, True),
    "schedule": (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2)),  # and virtual stages
    "recompute": ("none", "selective", "full"),
    "engine": ("torch", "deepspeed"),
    "dtype": ("float32", "bfloat16"),
    "reduce_dtype": ("float32", "bfloat16"),
    "variant": tuple(VARIANTS),
}
# Other families of models: in the layouts that reach what is different in them, not in every pair of axis values.
FAMILIES = {
    "qwen3": replace(MODEL, norm="rms_norm", kv_heads=4, qk_norm_per_head=True),  # grouped heads, each normed alone
    "gelu_tied": replace(
        MODEL, feed_forward="gelu", qk_norm=False, positions="rotary_interleaved", embedding_norm=True,
        tied_embeddings=True,
    ),
}  # fmt: skip
VARIANTS |= {name: (model, LossConfig(z_loss=1e-3)) for name, model in FAMILIES.items()}


@dataclass(frozen=True)
class Layout:
    """How a step is spread over ranks; the field names are those of ``AXES``, and what is trained."""

    pipeline: int = 1
    tensor: int = 1
    data: int = 1
    sequence: bool = False
    schedule: tuple[str, int] = ("1f1b", 1)
    recompute: str = "none"
    engine: str = "torch"
    dtype: str = "float32"
    reduce_dtype: str = "float32"
    variant: str = "layer_norm"
    trainable: str = "all"

    @staticmethod
    def parse(text: str) -> "Layout":
        """A layout from "pipeline.tensor.data" and words for all that is not the default, as ``str`` gives it."""
        sizes, *words = text.split()
        fields = dict(zip(("pipeline", "tensor", "data"), map(int, sizes.split(".")), strict=True))
        for word in words:
            schedule, _, stages = word.partition("-")
            if word == "sequence":
                fields["sequence"] = True
            elif word.startswith("reduce-"):
                fields["reduce_dtype"] = word.removeprefix("reduce-")
            elif word in CHOICES["training.trainable"]:
                fields["trainable"] = word
            elif stages:
                fields["schedule"] = (schedule, int(stages))
            else:
                named = AXES | {"variant": VARIANTS}
                axis = next(axis for axis in ("recompute", "engine", "dtype", "variant") if word in named[axis])
                fields[axis] = word
        return Layout(**fields)

    def __str__(self) -> str:
        default, words = Layout(), [f"{self.pipeline}.{self.tensor}.{self.data}"]
        for axis in [*list(AXES)[3:], "trainable"]:
            value = getattr(self, axis)
            if value != getattr(default, axis):
                words.append(
                    "sequence"
                    if axis == "sequence"
                    else f"{value[0]}-{value[1]}"
                    if axis == "schedule"
                    else f"reduce-{value}"
                    if axis == "reduce_dtype"
                    else value
                )
        return " ".join(words)

    @property
    def ranks(self) -> int:
        return self.pipeline * self.tensor * self.data

    @property
    def micro_batches(self) -> int:
        """Of every rank: two for each pipeline rank, so that a schedule has a middle between its two ends."""
        return 2 * self.pipeline

    @property
    def makes_sense(self) -> bool:
        """Whether such a layout exists, fits 8 ranks, and differs from one without the option."""
        virtual_stages = self.schedule[1]
        return (
            self.ranks <= 8
            and not (self.sequence and self.tensor == 1)
            and not (self.reduce_dtype == "bfloat16" and self.data == 1)
            and not (virtual_stages > 1 and self.pipeline == 1)
            and self.pipeline * virtual_stages <= MODEL.layers
            and not (self.pipeline > 1 and VARIANTS[self.variant][0].tied_embeddings)
        )

    def config(self, tiny: Config, optimizer: str) -> Config:
        model, loss = VARIANTS[self.variant]
        schedule, virtual_stages = self.schedule
        return replace(
            tiny,
            vocab=VocabConfig(text_tokens=500, image_codes=250),  # columns for each of eight ranks
            model=model,
            loss=loss,
            training=TrainingConfig(
                global_batch_size=ROWS,
                micro_batch_size=ROWS // (self.data * self.micro_batches),
                trainable=self.trainable,
            ),
            optimizer=replace(OPTIMIZERS[optimizer][0], reduce_dtype=self.reduce_dtype),
            runtime=replace(tiny.runtime, dtype=self.dtype),
            parallel=ParallelConfig(
                self.tensor, self.pipeline, self.sequence, schedule, virtual_stages, self.recompute
            ),
        )


def layouts_that_make_sense(axes: dict[str, tuple]) -> Iterator[Layout]:
    """Every combination of values of ``axes`` that could be run."""
    for values in itertools.product(*axes.values()):
        layout = Layout(**dict(zip(axes, values, strict=True)))
        if layout.makes_sense:
            yield layout


@dataclass(frozen=True)
class Training:
    """What three steps with one optimizer left, over all ranks.

    ``sums`` [steps, 4, 3]: nll, correct, off-range mass and count of every modality; ``norms`` [steps]; ``gradients``:
    of every step, by name (with "adamw" its first moments); ``weights``: after the last step. ``disagreements``: where
    ranks that should hold or report the same do not.
    """

    sums: np.ndarray
    norms: np.ndarray
    gradients: list[dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]
    disagreements: tuple[str, ...] = ()


def train_on_rank(make_training, make_batches, config: Config, engine_name: str, lr: float) -> dict:
    """Three steps on this rank; what it holds of the results, with the shards that say where that belongs."""
    pipeline, engine, groups = make_training(engine_name, config)
    loss = ModalityLoss((config.loss.text, config.loss.image, config.loss.special), config.loss.z_loss)
    sums, norms, gradients = [], [], []
    for step in range(STEPS):
        batches = make_batches(config, step, groups.data_rank, groups.data_size)
        metrics, norm = train_step(pipeline, engine, batches, loss, groups, lr)
        sums.append(torch.stack([metrics.nll, metrics.correct, metrics.off_range, metrics.counts.double()]).numpy())
        norms.append(norm)
        moments = [part for part in engine.fragments() if part.kind == EXP_AVG and part.written]
        gradients.append([(p.name, p.shard.shape, p.boxes, p.values.numpy().copy()) for p in moments])
    shards = pipeline.model.shards()
    weights = {n: (shards[n], p.detach().float().numpy()) for n, p in pipeline.model.named_parameters()}
    return {"sums": np.array(sums), "norms": np.array(norms), "gradients": gradients, "weights": weights}


def assemble(records: list[dict]) -> Training:
    """The global tensors of what the ranks hold: every element written once, all copies of a weight the same."""
    first, disagreements = records[0], []
    for rank, record in enumerate(records):
        for what in ("sums", "norms"):
            if not np.array_equal(record[what], first[what], equal_nan=True):
                disagreements.append(f"rank {rank} reports other {what}")
    gradients = [assemble_parts([record["gradients"][step] for record in records]) for step in range(STEPS)]
    weights, unequal = assemble_copies([record["weights"] for record in records])
    disagreements += [f"copies of {name} differ" for name in unequal]
    return Training(first["sums"], first["norms"], gradients, weights, tuple(disagreements))


def assemble_parts(parts_by_rank: list[list[tuple]]) -> dict[str, np.ndarray]:
    """Parts (name, global shape, boxes, values) of all ranks as global tensors, each element from exactly one part."""
    tensors, counts = {}, {}
    for name, shape, boxes, values in (part for parts in parts_by_rank for part in parts):
        tensor = tensors.setdefault(name, np.zeros(shape, np.float32))
        count = counts.setdefault(name, np.zeros(shape, np.int32))
        at = 0
        for box in boxes:
            place = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
            size = int(np.prod(box.shape))
            tensor[place] += values[at : at + size].reshape(box.shape)
            count[place] += 1
            at += size
        assert at == len(values), f"{name}: {at} elements in boxes, {len(values)} values"
    for name, count in counts.items():
        assert (count == 1).all(), f"{name}: elements come {np.unique(count).tolist()} times"
    return tensors


def assemble_copies(
    by_rank: list[dict[str, tuple[Shard, np.ndarray]]],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Local tensors with their shards, of all ranks, as global tensors; and the names of those with unequal copies."""
    tensors: dict[str, np.ndarray] = {}
    unequal = []
    for name, (shard, values) in (item for held in by_rank for item in held.items()):
        tensor = tensors.setdefault(name, np.full(shard.shape, np.nan, np.float32))
        there = shard.cut(torch.from_numpy(tensor)).numpy()
        if not (np.isnan(there) | (there == values)).all() and name not in unequal:
            unequal.append(name)
        put(torch.from_numpy(tensor), shard, torch.from_numpy(values))
    for name, tensor in tensors.items():
        assert not np.isnan(tensor).any(), f"{name}: elements that no rank holds"
    return tensors, unequal


def put(tensor: Tensor, shard: Shard, values: Tensor) -> None:
    """Write into the part of ``tensor`` that ``shard`` says: the inverse of ``Shard.cut``."""
    at = 0
    for start, stop in shard.pieces:
        piece = values.narrow(shard.dimension, at, stop - start)
        tensor.narrow(shard.dimension, start, stop - start).copy_(piece)
        at += stop - start


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of ``expected``."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def differences(found: Training, expected: Training) -> dict[str, float]:
    """The largest difference of every quantity over the steps: relative, but counts and correct ones in tokens.

    Tensors by norm: of all gradients or weights together, and of the tensor that differs most.
    """

    def together(tensors: dict[str, np.ndarray], names: Iterable[str]) -> np.ndarray:
        return np.concatenate([tensors[name].ravel() for name in names])

    nll, correct, off_range, counts = range(4)
    result = {"counts": float(np.abs(found.sums - expected.sums)[:, counts].max())}
    result["correct"] = float(np.abs(found.sums - expected.sums)[:, correct].max())
    for name, row in (("loss", nll), ("off_range", off_range)):
        result[name] = float(np.abs(found.sums[:, row] / expected.sums[:, row] - 1).max())
    result["norm"] = float(np.abs(found.norms / expected.norms - 1).max())
    pairs = [("gradient", a, b) for a, b in zip(found.gradients, expected.gradients, strict=True)]
    for name, a, b in (*pairs, ("weights", found.weights, expected.weights)):
        assert a.keys() == b.keys(), f"{name}: other parameters, {sorted(a.keys() ^ b.keys())}"
        each = {
            name: relative(together(a, b), together(b, b)),
            f"{name} of a tensor": max(relative(a[n], b[n]) for n in b),
        }
        for key, value in each.items():
            result[key] = max(value, result.get(key, 0.0))
    return result


def assert_same(found: dict[str, Training], expected: dict[str, Training], bounds: dict[str, float]) -> None:
    """``found`` and ``expected``, by optimizer, differ by no more than ``bounds`` says, and no ranks disagree."""
    faults = [f"{optimizer}: {fault}" for optimizer, training in found.items() for fault in training.disagreements]
    faults += [
        f"{optimizer}: {quantity} differs by {difference:.1e}, allowed are {bounds[quantity]:.1e}"
        for optimizer, training in found.items()
        for quantity, difference in differences(training, expected[optimizer]).items()
        if not difference <= bounds[quantity]  # true of NaN as well
    ]
    assert not faults, "\n".join(faults)
