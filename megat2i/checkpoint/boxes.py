"""Rectangles of a tensor: what two have in common, what is left of one without it, and where it lies in flat values."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from torch import Tensor

from megat2i.parallel.shard import Box


class Place(NamedTuple):
    """A box of a global tensor whose elements, in C order, begin at ``offset`` of some flat values."""

    box: Box
    offset: int

    def view(self, values: Tensor, inside: Box) -> Tensor:
        """The elements of ``inside``, a box within this one, as a view of ``values`` [n] in the shape of ``inside``."""
        block = values[self.offset : self.offset + prod(self.box.shape)].view(self.box.shape)
        bounds = zip(inside.start, inside.stop, self.box.start, strict=True)
        return block[tuple(slice(start - corner, stop - corner) for start, stop, corner in bounds)]


def places(boxes: list[Box]) -> Iterator[Place]:
    """Each box with its offset in flat values that hold the boxes' elements one after another."""
    offset = 0
    for box in boxes:
        yield Place(box, offset)
        offset += prod(box.shape)


def common(one: Box, other: Box) -> Box | None:
    """The elements that are in both; None where there are none."""
    start = tuple(max(a, b) for a, b in zip(one.start, other.start, strict=True))
    stop = tuple(min(a, b) for a, b in zip(one.stop, other.stop, strict=True))
    return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None


def without(box: Box, part: Box) -> Iterator[Box]:
    """Boxes, none of them overlapping, of the elements of ``box`` that are not in ``part``, a box within it."""
    start, stop = list(box.start), list(box.stop)
    for dimension, (low, high) in enumerate(zip(part.start, part.stop, strict=True)):
        if start[dimension] < low:
            yield Box(tuple(start), (*stop[:dimension], low, *stop[dimension + 1 :]))
        if high < stop[dimension]:
            yield Box((*start[:dimension], high, *start[dimension + 1 :]), tuple(stop))
        start[dimension], stop[dimension] = low, high  # what remains lies beside the part in later dimensions only
