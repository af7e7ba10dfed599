"""Which part of a global tensor a rank holds, and where a run of its elements lies in the global tensor."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """A rectangle of a global tensor of one or two dimensions: ``start`` and ``stop`` of every dimension."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True)
class Shard:
    """The part of a tensor of global ``shape`` that a rank holds: ``pieces`` (start, stop) of ``dimension``, in order.

    Several pieces are possible along dimension 0 only: parts that are split one by one, as query, key and value are.
    """

    shape: tuple[int, ...]
    dimension: int
    pieces: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if len(self.shape) > 2 or not 0 <= self.dimension < len(self.shape):
            raise ValueError(f"a shard of dimension {self.dimension} of a tensor of shape {self.shape}")
        if self.dimension and len(self.pieces) > 1:
            raise ValueError(f"several pieces {self.pieces} along dimension {self.dimension}")

    @staticmethod
    def whole(shape: tuple[int, ...]) -> "Shard":
        """All of a tensor."""
        return Shard(tuple(shape), 0, ((0, shape[0]),))

    @property
    def local_shape(self) -> tuple[int, ...]:
        sizes = list(self.shape)
        sizes[self.dimension] = sum(stop - start for start, stop in self.pieces)
        return tuple(sizes)

    @property
    def is_whole(self) -> bool:
        return self.local_shape == self.shape

    def cut(self, tensor: Tensor) -> Tensor:
        """This rank's part of the global ``tensor``."""
        return torch.cat([tensor.narrow(self.dimension, a, b - a) for a, b in self.pieces], self.dimension)

    def boxes(self, start: int, stop: int) -> list[Box]:
        """Elements ``start`` .. ``stop`` of the flattened local tensor as boxes of the global one, in their order.

        At most three rectangles a piece: the rest of a row, whole rows, the beginning of a row. The elements of one box
        in C order follow those of the box before it.
        """
        if not 0 <= start <= stop <= prod(self.local_shape):
            raise ValueError(f"elements {start} to {stop} of a local tensor of shape {self.local_shape}")
        if start == stop:
            return []
        if len(self.shape) == 1:
            return [Box((a,), (b,)) for a, b in self._global_runs(start, stop)]
        rows, columns = [], self.local_shape[1]  # rectangles: top, bottom, left, right
        first, last = -(-start // columns), stop // columns  # whole rows
        if first > last:  # within one row
            rows.append((last, first, start - last * columns, stop - last * columns))
        else:
            if start < first * columns:
                rows.append((first - 1, first, start - (first - 1) * columns, columns))
            if first < last:
                rows.append((first, last, 0, columns))
            if last * columns < stop:
                rows.append((last, last + 1, 0, stop - last * columns))
        if self.dimension == 1:
            shift = self.pieces[0][0]
            return [Box((top, left + shift), (bottom, right + shift)) for top, bottom, left, right in rows]
        return [
            Box((a, left), (b, right)) for top, bottom, left, right in rows for a, b in self._global_runs(top, bottom)
        ]

    def _global_runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Local indices ``start`` .. ``stop`` of the cut dimension as global runs."""
        runs, offset = [], 0
        for a, b in self.pieces:
            low, high = max(start, offset), min(stop, offset + b - a)
            if low < high:
                runs.append((a + low - offset, a + high - offset))
            offset += b - a
        return runs
