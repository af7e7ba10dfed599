"""Blending: exact shares, evenly spread, each dataset's positions in order and without gaps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megat2i.data.blend import Blend


def picks(blend: Blend, count: int):
    return blend.pick(np.arange(count))


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([3.0], [1]),
        ([0.5, 0.5], [1, 1]),
        ([0.7, 0.3], [7, 3]),
        ([70, 20, 10], [7, 2, 1]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([0.999, 0.001], [999, 1]),
        ([np.pi, 1.0], [759, 241]),  # no exact cycle: largest remainder of 1,000
        ([1.0] * 7, [1] * 7),
    ],
)
def test_counts_per_cycle(weights, counts):
    blend = Blend(weights)
    assert blend.counts.tolist() == counts
    dataset, _ = picks(blend, 5 * sum(counts))
    assert np.bincount(dataset).tolist() == [5 * count for count in counts]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=12))
def test_even_gapless_and_near_the_weights(weights):
    blend = Blend(weights)
    count = 2 * blend.cycle_length + 3
    dataset, position = picks(blend, count)
    shares = np.array(weights) / np.sum(weights)
    assert np.abs(blend.counts / blend.cycle_length - shares).max() <= 1e-3
    for number in range(len(weights)):
        mine = dataset == number
        assert np.array_equal(position[mine], np.arange(mine.sum()))  # 0, 1, 2, ...: no gap, no repetition
        exact = np.arange(1, count + 1) * blend.counts[number] / blend.cycle_length
        assert np.abs(np.cumsum(mine) - exact).max() < 1


def test_control_blocks_are_not_even():
    """The bound above is one that a cycle of blocks breaks."""
    counts = Blend([0.7, 0.3]).counts
    mine = np.repeat([0, 1], counts) == 0
    assert np.abs(np.cumsum(mine) - np.arange(1, 11) * 0.7).max() > 1


def test_golden_values():
    """Worked out by hand and pinned: runs that resume depend on them."""
    dataset, position = picks(Blend([5, 3, 2]), 12)
    assert dataset.tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]
    assert position.tolist() == [0, 0, 1, 0, 2, 1, 3, 2, 4, 1, 5, 3]


def test_any_shape_far_along():
    blend = Blend([2, 1])
    far = 10**15
    dataset, position = blend.pick(np.array([[far, far + 1], [far + 2, far + 3]]))
    assert dataset.shape == position.shape == (2, 2)
    assert position.min() >= far // 3 - 1 and blend.pick(0)[0] == 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "one positive number per dataset"),
        ([1, 0], "positive"),
        ([1, -1], "positive"),
        ([1, float("nan")], "positive"),
        ([1, float("inf")], "positive"),
        ([1.0, 0.0001, 1.0], "blend weight 0.0001 of dataset 1 .* rounds to 0 positions"),
        ([1.0] * 1001, "rounds to 0 positions"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        Blend(weights)
