"""How long the captions and the images of a store are, from its index alone, in memory that does not grow with it."""

import numpy as np

from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import CaptionLengths
from megat2i.vocab import TEXT

SEQUENCES = 1 << 18  # whose lengths are counted at a time


def length_counts(store: IndexedDataset, modality: int) -> np.ndarray:
    """How many sequences of a modality have each length, int64 [longest + 1]; empty where there are none."""
    counts = np.zeros(0, np.int64)
    for start in range(0, len(store), SEQUENCES):
        some = slice(start, start + SEQUENCES)
        found = np.bincount(store.lengths[some][store.modes[some] == modality])
        if len(found) > len(counts):
            counts, found = found.astype(np.int64), counts
        counts[: len(found)] += found
        store.release()
    return counts


def caption_lengths(store: IndexedDataset) -> CaptionLengths | None:
    """Of a store of captioned images; None where it has no captions."""
    counts = length_counts(store, TEXT)
    if not len(counts):
        return None
    ends = np.cumsum(counts)
    median, high = (int(np.searchsorted(ends, share * ends[-1])) for share in (0.5, 0.99))
    return CaptionLengths(median, high, len(counts) - 1)
