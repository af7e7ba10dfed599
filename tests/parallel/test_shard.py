"""Runs of a rank's elements against a numbered global tensor."""

import pytest
import torch

from megat2i.parallel.shard import Shard

SHARDS = [
    Shard((7,), 0, ((2, 5),)),
    Shard((6, 5), 0, ((4, 6), (0, 1))),  # striped: a later part first
    Shard((6, 5), 1, ((2, 4),)),
    Shard.whole((4, 3)),
    Shard.whole((5,)),
]


def numbered(shape) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_every_run_lies_where_its_boxes_say(shard):
    everything = numbered(shard.shape)
    local = shard.cut(everything)
    assert tuple(local.shape) == shard.local_shape
    flat = local.flatten()
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            boxes = shard.boxes(start, stop)
            found = [
                everything[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))].flatten()
                for box in boxes
            ]
            assert torch.equal(torch.cat([flat[:0], *found]), flat[start:stop]), (start, stop)
            assert all(min(box.shape) > 0 for box in boxes)


def test_only_a_whole_shard_is_whole():
    assert Shard.whole((4, 3)).is_whole
    assert not Shard((6, 5), 1, ((2, 4),)).is_whole


def test_a_shard_that_cannot_be_described_is_refused():
    with pytest.raises(ValueError, match="several pieces"):
        Shard((4, 4), 1, ((0, 1), (2, 3)))
    with pytest.raises(ValueError, match="dimension 1"):
        Shard((4,), 1, ((0, 1),))
    with pytest.raises(ValueError, match="elements 0 to 13"):
        Shard.whole((4, 3)).boxes(0, 13)
