"""Stages of the pipeline: contiguous, complete, and no better partition exists."""

from dataclasses import replace
from itertools import combinations

import pytest

from megat2i.config import ModelConfig
from megat2i.model import cost
from megat2i.model.partition import StageLayers, partition, stage_forward_flops, stage_parameters

SHAPE = ModelConfig()  # open_lm's 1B
COLUMNS, LENGTH = 66_668, 1152


def counts(parts: tuple[StageLayers, ...]) -> list[int]:
    return [part.stop - part.first for part in parts]


def largest(parts, measure, *arguments) -> int:
    return max(measure(part, *arguments) for part in parts)


def compositions(layers: int, stages: int):
    """Every way to cut ``layers`` into ``stages`` contiguous parts."""
    for cuts in combinations(range(1, layers), stages - 1):
        bounds = (0, *cuts, layers)
        yield tuple(
            StageLayers(a, b, embedding=a == 0, head=b == layers) for a, b in zip(bounds, bounds[1:], strict=False)
        )


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 8, 12, 24])
def test_every_layer_is_held_once_and_in_order(stages):
    parts = partition(SHAPE, COLUMNS, LENGTH, stages)
    assert [layer for part in parts for layer in range(part.first, part.stop)] == list(range(24))
    assert len(parts) == stages and min(counts(parts)) >= 1
    assert [part.embedding for part in parts] == [True] + [False] * (stages - 1)
    assert [part.head for part in parts] == [False] * (stages - 1) + [True]
    assert parts == partition(SHAPE, COLUMNS, LENGTH, stages)


@pytest.mark.parametrize("columns", [100, 30_000, 66_668, 500_000])
@pytest.mark.parametrize(("layers", "stages"), [(5, 2), (9, 3), (10, 4), (12, 5), (12, 6), (8, 8), (11, 7)])
def test_no_partition_is_better(columns, layers, stages):
    shape = replace(SHAPE, layers=layers)

    def badness(parts):
        flops = [stage_forward_flops(part, shape, columns, LENGTH) for part in parts]
        memory = largest(parts, stage_parameters, shape, columns)
        return max(flops), memory, sum(work**2 for work in flops)

    found = badness(partition(shape, columns, LENGTH, stages))
    everything = [badness(parts) for parts in compositions(layers, stages)]
    assert found == min(everything)
    assert found < max(everything) or len(everything) == 1  # the comparison can tell partitions apart


def test_the_wide_head_takes_the_place_of_layers():
    assert cost.head_forward_flops(SHAPE, COLUMNS) > 2 * cost.layer_forward_flops(SHAPE, LENGTH)
    assert counts(partition(SHAPE, COLUMNS, LENGTH, 4)) == [6, 7, 7, 4]
    equal = tuple(StageLayers(6 * s, 6 * s + 6, s == 0, s == 3) for s in range(4))
    balanced = largest(partition(SHAPE, COLUMNS, LENGTH, 4), stage_forward_flops, SHAPE, COLUMNS, LENGTH)
    assert balanced < 0.85 * largest(equal, stage_forward_flops, SHAPE, COLUMNS, LENGTH)


def test_the_embedding_counts_where_the_work_is_equal():
    """With a slim head 13 layers on 4 stages leave one stage with 4: never the one that holds the embedding."""
    parts = partition(replace(SHAPE, layers=13), 1000, LENGTH, 4)
    assert counts(parts)[0] == 3 and max(counts(parts)) == 4


@pytest.mark.parametrize("stages", [0, 25])
def test_more_stages_than_layers_are_refused(stages):
    with pytest.raises(ValueError, match=rf"^{stages} pipeline stages .* 24 layers.*choose 1 to 24 stages$"):
        partition(SHAPE, COLUMNS, LENGTH, stages)
