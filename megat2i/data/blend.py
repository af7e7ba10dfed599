"""Mixing datasets by weight: which dataset, and which of its positions, comes at each position of the training data.

The datasets alternate in a fixed cycle in which each has its exact share, spread evenly. It is arithmetic, as the order
is: no index file, no state.
"""

from collections.abc import Sequence

import numpy as np

MAXIMUM_CYCLE = 1000


class Blend:
    """Positions dealt to datasets in proportion to ``weights`` (positive numbers, of any sum).

    The cycle is the shortest of at most 1,000 positions in which every share is a whole number; where there is none, it
    has 1,000 and the shares are rounded (largest remainder). ``counts`` holds each dataset's positions per cycle.
    Raises ValueError where a weight is not positive, or so small that its dataset would never be picked.
    """

    def __init__(self, weights: Sequence[float]):
        self.counts = _counts(weights)
        self.cycle_length = int(self.counts.sum())
        self._datasets = np.empty(self.cycle_length, np.int64)
        self._earlier = np.empty(self.cycle_length, np.int64)  # picks of the same dataset before, within the cycle
        picked = np.zeros_like(self.counts)
        for position in range(self.cycle_length):
            # Earliest deadline first, among those whose next pick is due: at no point is a dataset a whole pick ahead
            # of its share or behind it. Whole numbers, so that ties are broken alike everywhere.
            due = picked * self.cycle_length < self.counts * (position + 1)
            deadline = -(-(picked + 1) * self.cycle_length // self.counts)
            dataset = int(np.argmin(np.where(due, deadline, self.cycle_length + 1)))
            self._datasets[position], self._earlier[position] = dataset, picked[dataset]
            picked[dataset] += 1

    def pick(self, index) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, position within that dataset's own sequence of picks), both int64 of the shape of ``index``."""
        cycle, place = np.divmod(np.asarray(index, np.int64), self.cycle_length)
        dataset = self._datasets[place]
        return dataset, cycle * self.counts[dataset] + self._earlier[place]


def _counts(weights: Sequence[float]) -> np.ndarray:
    """Positions per cycle of each dataset (int64)."""
    shares = np.asarray(weights, np.float64)
    if shares.ndim != 1 or not shares.size or not np.isfinite(shares).all() or (shares <= 0).any():
        raise ValueError(f"blend weights {list(weights)} must be one positive number per dataset; leave others out")
    shares = shares / shares.sum()
    for length in range(1, MAXIMUM_CYCLE + 1):
        counts = np.rint(shares * length)
        if np.abs(counts - shares * length).max() < 1e-9 * length:
            return counts.astype(np.int64)
    counts = np.floor(shares * MAXIMUM_CYCLE)
    remainders = shares * MAXIMUM_CYCLE - counts
    counts[np.argsort(-remainders, kind="stable")[: MAXIMUM_CYCLE - int(counts.sum())]] += 1
    if (counts == 0).any():
        dataset = int(np.argmin(counts))
        raise ValueError(
            f"blend weight {weights[dataset]} of dataset {dataset} is {shares[dataset]:.2e} of the sum and rounds to "
            f"0 positions in {MAXIMUM_CYCLE}; raise it, or merge small stores into one"
        )
    return counts.astype(np.int64)
