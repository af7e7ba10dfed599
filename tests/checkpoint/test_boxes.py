"""Rectangles against a grid on which every element is counted."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megat2i.checkpoint.boxes import common, places, without
from megat2i.parallel.shard import Box

SIZE = 6


@st.composite
def two_boxes(draw) -> tuple[Box, Box]:
    dimensions = draw(st.sampled_from([1, 2]))
    bounds = [
        sorted(draw(st.lists(st.integers(0, SIZE), min_size=2, max_size=2, unique=True))) for _ in range(2 * dimensions)
    ]
    first, second = bounds[:dimensions], bounds[dimensions:]
    return tuple(Box(tuple(low for low, _ in one), tuple(high for _, high in one)) for one in (first, second))


def grid(box: Box, *boxes: Box) -> torch.Tensor:
    """How often each element of a small tensor is in the boxes; ``box`` gives the number of dimensions."""
    count = torch.zeros((SIZE,) * len(box.start), dtype=torch.int)
    for each in boxes:
        count[tuple(slice(a, b) for a, b in zip(each.start, each.stop, strict=True))] += 1
    return count


@given(two_boxes())
def test_what_is_common_and_what_is_left_make_up_the_box(boxes):
    one, other = boxes
    both = common(one, other)
    assert both == common(other, one)
    expected = grid(one, one).logical_and(grid(one, other)).int()
    if both is None:
        assert not expected.any()
        return
    assert torch.equal(grid(one, both), expected)
    rest = list(without(one, both))
    assert all(prod(box.shape) > 0 for box in rest)
    assert torch.equal(grid(one, both, *rest), grid(one, one)), "an element is lost or twice there"


@given(two_boxes())
def test_a_view_is_the_part_of_the_tensor_that_the_box_names(boxes):
    one, other = boxes
    everything = torch.arange(SIZE ** len(one.start)).view((SIZE,) * len(one.start))

    def cut(box: Box) -> torch.Tensor:
        return everything[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]

    values = torch.cat([cut(one).flatten(), cut(other).flatten()])
    first, second = places([one, other])
    inside = common(one, other)
    for place in (first, second) if inside else ():
        assert torch.equal(place.view(values, inside), cut(inside))
        assert place.view(values, inside).untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    assert torch.equal(second.view(values, other), cut(other))
