"""Which sample comes when: a keyed permutation of a dataset for every (seed, epoch), by arithmetic alone.

There is no index file and no state, so a run resumes at any step by computing. The permutation is a Feistel network
(bijective whatever its round function) on the smallest power of two, at least 64, that holds the dataset; a value that
falls outside the dataset is sent through again until it falls inside ("cycle walking"). The round function is
SplitMix64's mixer.

The values must never change: runs that resume depend on them.
"""

import numpy as np

MAXIMUM_SIZE = 2**40
MINIMUM_BITS = 6  # on fewer, the rounds do not make all permutations equally likely
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment: 2^64 divided by the golden ratio
ROUND_CONSTANTS = [np.uint64(GOLDEN * number % 2**64) for number in range(1, 9)]


def sample(seed: int, epoch, index, size: int) -> np.ndarray:
    """The sample that stands at ``index`` of an epoch: int64, of the broadcast shape of ``epoch`` and ``index``.

    For fixed seed, epoch and size (1 to 2^40) it is a permutation of range(size). Raises ValueError for a seed or epoch
    that is negative or beyond 63 bits, a size out of bounds, or an index outside range(size).
    """
    if not 1 <= size <= MAXIMUM_SIZE:
        raise ValueError(f"a dataset of {size} samples cannot be ordered; 1 to 2^40 can")
    epoch, index = np.broadcast_arrays(np.asarray(epoch), np.asarray(index))
    shape, index = index.shape, index.reshape(-1)
    if index.size and not (index.min() >= 0 and index.max() < size):
        raise ValueError(f"indices {index.min()} to {index.max()} are not all within range({size})")
    keys = _keys(seed, epoch.reshape(-1))
    bits = max(MINIMUM_BITS, (size - 1).bit_length())
    values = _feistel(index.astype(np.uint64), keys, bits)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], bits)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(shape)


def _keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """One 64-bit key per element of ``epoch``; different epochs of one seed never share a key."""
    if not 0 <= seed < 2**63 or (epoch.size and not (epoch.min() >= 0 and epoch.max() < 2**63)):
        raise ValueError(f"seed {seed} and the epochs must be whole numbers from 0 to 2^63 - 1")
    return _mix(_mix(np.array([seed], np.uint64) + np.uint64(GOLDEN)) ^ epoch.astype(np.uint64))


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's mixer, a bijection of 64-bit numbers. Products wrap, as they should."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of range(2^bits). The halves differ by one bit where ``bits`` is odd; they take turns."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for odd, even in zip(ROUND_CONSTANTS[0::2], ROUND_CONSTANTS[1::2], strict=True):
        high = high ^ (_mix(low + keys + odd) & high_mask)
        low = low ^ (_mix(high + keys + even) & low_mask)
    return (high << low_bits) | low
