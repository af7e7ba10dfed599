"""Whether all state is finite: one sum of magnitudes over it, and a search only where that is not finite."""

import math
from math import prod

import torch
from torch import Tensor, nn

from megat2i.optim.engine import EXP_AVG, EXP_AVG_SQ, WEIGHT, Fragment
from megat2i.parallel.shard import Box

KIND_NAMES = {WEIGHT: "the weight", EXP_AVG: "Adam's first moment of", EXP_AVG_SQ: "Adam's second moment of"}


@torch.no_grad()
def not_finite(fragments: list[Fragment]) -> str | None:
    """The first tensor and row of it with a value that is NaN or infinite, in words; None where there is none."""
    values = [fragment.values for fragment in fragments if fragment.values.numel()]
    if not values or math.isfinite(nn.utils.get_total_norm(values, 1.0).item()):
        return None
    for fragment in fragments:  # a sum of large finite values may overflow, so each value has the last word
        row = row_not_finite(fragment.values, fragment.boxes)
        if row is not None:
            return f"{KIND_NAMES[fragment.kind]} {fragment.name} in row {row}"
    return None


def row_not_finite(values: Tensor, boxes: list[Box]) -> int | None:
    """First row of the global tensor with a value that is not finite, of flat ``values`` [n] that fill ``boxes``."""
    if not values.numel() or torch.isfinite(torch.stack(torch.aminmax(values))).all():
        return None
    index = int((~torch.isfinite(values)).nonzero()[0])
    for box in boxes:
        if index < prod(box.shape):
            return box.start[0] + index // prod(box.shape[1:])
        index -= prod(box.shape)
    raise ValueError(f"{len(values)} values for the boxes {boxes}")
