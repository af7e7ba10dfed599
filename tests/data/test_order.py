"""The order of samples: a permutation for every (seed, epoch), without pattern, and the same values for ever."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from megat2i.data.order import sample

MASK = 2**64 - 1


def mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def slow_sample(seed: int, epoch: int, index: int, size: int) -> int:
    """The specification in whole numbers of Python, one value at a time."""
    golden = 0x9E3779B97F4A7C15
    key = mix(mix((seed + golden) & MASK) ^ epoch)
    bits = max(6, (size - 1).bit_length())
    low_bits, high_bits = bits // 2, bits - bits // 2
    while True:
        high, low = index >> low_bits, index & (1 << low_bits) - 1
        for number in (1, 3, 5, 7):
            high ^= mix((low + key + number * golden) & MASK) & (1 << high_bits) - 1
            low ^= mix((high + key + (number + 1) * golden) & MASK) & (1 << low_bits) - 1
        index = high << low_bits | low
        if index < size:
            return index


def test_golden_values():
    """Pinned: runs that resume depend on them. A change here changes the data order of every run."""
    assert sample(0, 0, np.arange(10), 10).tolist() == [6, 7, 3, 8, 2, 9, 0, 1, 5, 4]
    assert sample(1234, 3, np.arange(8), 1000).tolist() == [969, 511, 58, 427, 11, 69, 204, 107]
    assert sample(7, 1, [0, 1, 2**39], 2**40).tolist() == [1072819835764, 900168169004, 337862288608]
    assert sample(1, 0, np.arange(5), 5).tolist() == [2, 1, 3, 4, 0]
    assert sample(2**63 - 1, 2**40, 0, 2**40).shape == ()


def test_equals_the_specification():
    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 63, 64, 65, 1000, 2**20 + 1, 2**33, 2**40 - 1, 2**40):
        seed, epoch = int(generator.integers(2**63)), int(generator.integers(2**63))
        indices = generator.integers(0, size, 20)
        assert sample(seed, epoch, indices, size).tolist() == [slow_sample(seed, epoch, int(i), size) for i in indices]


@pytest.mark.parametrize(
    "size", [1, 2, 3, 4, 5, 7, 8, 31, 63, 64, 65, 127, 128, 129, 1000, 1024, 1025, 65_537, 300_000]
)
def test_every_sample_exactly_once(size):
    for seed, epoch in ((0, 0), (0, 1), (5, 0)):
        values = sample(seed, epoch, np.arange(size), size)
        assert values.dtype == np.int64
        assert np.array_equal(np.sort(values), np.arange(size))


def test_control_a_plain_hash_is_no_permutation():
    values = np.array([mix(i) % 1000 for i in range(1000)])
    assert not np.array_equal(np.sort(values), np.arange(1000))


def test_seeds_and_epochs_differ():
    index = np.arange(1000)
    orders = {sample(seed, epoch, index, 1000).tobytes() for seed in range(30) for epoch in range(30)}
    assert len(orders) == 900


def test_no_pattern():
    size = 20_000
    index = np.arange(size)
    first, second = sample(3, 0, index, size), sample(3, 1, index, size)
    bound = 5 / np.sqrt(size)  # five standard deviations of a correlation of independent values
    for left, right in ((first, index), (first, second), (first[:-1], first[1:]), (first, sample(4, 0, index, size))):
        assert abs(np.corrcoef(left, right)[0, 1]) < bound
        assert (left == right[: len(left)]).sum() < 12  # a random permutation agrees in one place on average
    # Each tenth of an epoch draws evenly from all tenths of the file.
    table = np.histogram2d(index, first, bins=10)[0]
    assert ((table - size / 100) ** 2 / (size / 100)).sum() < 81 + 6 * np.sqrt(2 * 81)
    # Control: the same checks see a rotation and a reversal.
    assert abs(np.corrcoef(np.roll(index, 7), index)[0, 1]) > bound
    assert np.histogram2d(index, index[::-1], bins=10)[0].max() == size / 10


def test_permutations_of_a_small_set_are_equally_likely():
    epochs = 12_000
    for size, combinations in ((2, 2), (3, 6), (5, 120)):
        every = np.repeat(np.arange(epochs), size)
        seen = Counter(
            map(tuple, sample(9, every, np.tile(np.arange(size), epochs), size).reshape(epochs, size).tolist())
        )
        expected = epochs / combinations
        chi_square = sum((seen[order] - expected) ** 2 / expected for order in permutations(range(size)))
        assert chi_square < combinations - 1 + 6 * np.sqrt(2 * combinations)


def test_shapes_and_mixed_epochs():
    index, epoch = np.arange(12).reshape(3, 4), np.array([[0], [1], [2]])
    values = sample(1, epoch, index, 100)
    assert values.shape == (3, 4)
    for row in range(3):
        assert np.array_equal(values[row], sample(1, row, index[row], 100))
    assert sample(1, 0, np.array([], np.int64), 5).shape == (0,)


def test_bad_arguments():
    for arguments, message in (
        ((0, 0, 0, 0), "0 samples cannot be ordered"),
        ((0, 0, 0, 2**40 + 1), "cannot be ordered"),
        ((0, 0, [3, 10], 10), "indices 3 to 10 are not all within"),
        ((0, 0, -1, 10), "not all within"),
        ((-1, 0, 0, 10), "seed -1"),
        ((2**63, 0, 0, 10), "seed"),
        ((0, -1, 0, 10), "epochs must be"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(*arguments)
