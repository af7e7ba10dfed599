"""Which rows make up a training step or an evaluation, and how they are dealt over data-parallel ranks.

Position p of the training data belongs to step p // B for a global batch of B rows, whatever the number of ranks. The
blend names its dataset, the epoch follows from how often that dataset was used up, the order names the row. All of it
is arithmetic on p, so resuming at step k is asking for step k.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from megat2i.data import order
from megat2i.data.blend import Blend
from megat2i.data.indexed import IndexedDataset
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.kernels import LiveTokens

LIVE_MARGIN = 1.02  # of the average; a micro-batch that has more is computed without the list, right but slower
LIVE_TILE = 128  # positions: a row tile of the loss head


class Sample(NamedTuple):
    """Where a row came from: number of the dataset in the blend, epoch (None in evaluation), row of the dataset."""

    dataset: int
    epoch: int | None
    row: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch of b rows of S positions.

    tokens, labels: int64[b, S]; modality: int8[b, S], as in Row. samples: where the rows came from; in evaluation they
    may be fewer than b, the remaining rows being padding. text_cut: caption tokens of these rows that did not fit.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    modality: torch.Tensor
    samples: list[Sample]
    text_cut: int
    live_capacity: int = 0
    live: LiveTokens | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on ``device``; for a GPU also where the positions with a label stand.

        A GPU would have to be asked, and would make the host wait; on a CPU the loss head finds them for nothing.
        """
        tensors = {name: getattr(self, name).to(device) for name in ("tokens", "labels", "modality")}
        if device.type == "cuda" and self.live_capacity:
            found = LiveTokens.collect(self.modality, self.live_capacity)
            tensors["live"] = found.to(device) if found else None
        return replace(self, **tensors)


class TrainingData:
    """The rows of every training step, from ``datasets``: pairs of a T2IDataset and its weight in the blend."""

    def __init__(self, datasets: Sequence[tuple[T2IDataset, float]], seed: int, global_batch_size: int):
        if global_batch_size < 1:
            raise ValueError(f"training.global_batch_size is {global_batch_size}, expected at least 1")
        shapes = {(dataset.sequence_length, dataset.vocab) for dataset, _ in datasets}
        if len(shapes) > 1:
            raise ValueError(f"the datasets of a blend differ in sequence length or vocabulary: {shapes}")
        self.datasets = [dataset for dataset, _ in datasets]
        self.blend = Blend([weight for _, weight in datasets])
        self.seed, self.global_batch_size = seed, global_batch_size
        self._mean_labels = max(dataset.mean_labels for dataset in self.datasets)

    def samples(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> list[Sample]:
        """The samples of the global batch of ``step`` (counted from 0), in order; or one rank's contiguous share."""
        if step < 0:
            raise ValueError(f"step {step} is before the first one, 0")
        share = self.global_batch_size // dp_size
        first = step * self.global_batch_size + dp_rank * share
        which, position = self.blend.pick(np.arange(first, first + share))
        epoch, row = np.empty_like(position), np.empty_like(position)
        for number, dataset in enumerate(self.datasets):
            mine = which == number
            epoch[mine], index = np.divmod(position[mine], len(dataset))
            row[mine] = order.sample(self.seed, epoch[mine], index, len(dataset))
        return [Sample(*sample) for sample in zip(which.tolist(), epoch.tolist(), row.tolist(), strict=True)]

    def byte_offsets(self, step: int) -> list[tuple[IndexedDataset, np.ndarray]]:
        """Of each dataset its store and where in the .bin the rows begin that all ranks together read for ``step``."""
        rows: list[list[int]] = [[] for _ in self.datasets]
        for sample in self.samples(step):
            rows[sample.dataset].append(sample.row)
        return [
            (d.store, d.byte_offsets(np.array(some, np.int64))) for d, some in zip(self.datasets, rows, strict=True)
        ]

    def micro_batches(self, step: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[Batch]:
        """The micro-batches of ``step`` for one data-parallel rank.

        Raises ValueError where the global batch does not divide into dp_size * micro_batch_size.
        """
        _check_rank(dp_rank, dp_size, micro_batch_size)
        if self.global_batch_size % (dp_size * micro_batch_size):
            raise ValueError(
                f"training.global_batch_size {self.global_batch_size} is not a multiple of {dp_size} data-parallel "
                f"ranks x training.micro_batch_size {micro_batch_size}; change one of the three"
            )
        samples = self.samples(step, dp_rank, dp_size)
        capacity = self._live_capacity(micro_batch_size)
        return [
            _batch(self.datasets, samples[start : start + micro_batch_size], micro_batch_size, capacity)
            for start in range(0, len(samples), micro_batch_size)
        ]

    def _live_capacity(self, rows: int) -> int:
        """Room for the positions with a label of ``rows`` rows: a little more than the fullest dataset's average."""
        tiles = -(-int(rows * self._mean_labels * LIVE_MARGIN) // LIVE_TILE) + 1
        return min(tiles * LIVE_TILE, rows * self.datasets[0].sequence_length)


def evaluation_batches(
    dataset: T2IDataset, dp_rank: int, dp_size: int, micro_batch_size: int, rows: int | None = None
) -> Iterator[Batch]:
    """One data-parallel rank's batches of an evaluation over rows 0 to ``rows`` - 1 (all by default), in file order.

    No row is shuffled and no caption dropped. Every rank gets the same number of batches of micro_batch_size rows;
    where the rows run out, the rest are rows of <pad> whose labels are all ignored. Raises ValueError for more rows
    than exist.
    """
    _check_rank(dp_rank, dp_size, micro_batch_size)
    rows = len(dataset) if rows is None else rows
    if not 1 <= rows <= len(dataset):
        raise ValueError(f"an evaluation of {rows} rows, {dataset.store.prefix} has {len(dataset)}")

    def batches() -> Iterator[Batch]:
        for number in range(-(-rows // (dp_size * micro_batch_size))):
            start = (number * dp_size + dp_rank) * micro_batch_size
            samples = [Sample(0, None, row) for row in range(start, min(start + micro_batch_size, rows))]
            yield _batch([dataset], samples, micro_batch_size)

    return batches()  # a generator of its own, so that the checks above run when this function is called


def _batch(datasets: Sequence[T2IDataset], samples: list[Sample], size: int, live_capacity: int = 0) -> Batch:
    """The rows of ``samples`` as a batch of ``size`` rows; rows beyond them are padding."""
    tokens, labels, modality = datasets[0].blank_rows(size)
    text_cut = 0
    for at, sample in enumerate(samples):
        text_cut += datasets[sample.dataset].fill(sample.row, sample.epoch, tokens[at], labels[at], modality[at])
    return Batch(
        torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(modality), samples, text_cut, live_capacity
    )


def _check_rank(dp_rank: int, dp_size: int, micro_batch_size: int) -> None:
    if not 0 <= dp_rank < dp_size or micro_batch_size < 1:
        raise ValueError(f"data-parallel rank {dp_rank} of {dp_size} with micro-batches of {micro_batch_size} rows")
