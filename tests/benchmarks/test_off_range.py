"""What a record of off-range mass counts, by hand, and against what mode "certified" really leaves out."""

import pytest
import torch

from megat2i.kernels import linear_cross_entropy

RANGES = ((0, 100), (104, 404))


@pytest.fixture(scope="module")
def bench(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        import bench_off_range

        yield bench_off_range


def test_tiles_by_hand(bench):
    targets = torch.full((300,), 5)  # tiles: text, text and images, a short one of images, which has no target but one
    targets[200:] = 200
    targets[257:] = -1
    mass = torch.zeros(300)
    assert bench.tiles(mass, targets, RANGES).tolist() == pytest.approx([1.0, (0.25 + 1.0 + 0.75) / 3])
    mass[3] = 2e-3
    assert bench.tiles(mass, targets, RANGES).tolist() == pytest.approx([2 / 3, (1.0 + 1.0 + 0.75) / 3])
    mass[280] = 1.0  # of a place without a target
    assert bench.tiles(mass, targets, RANGES)[0] == pytest.approx(2 / 3)


def test_what_is_counted_is_what_the_head_leaves_out(bench):
    generator = torch.Generator().manual_seed(0)
    targets = torch.cat([torch.randint(*pair, (256,), generator=generator) for pair in RANGES])
    weight, hidden = torch.randn(404, 16, generator=generator), torch.randn(512, 16, generator=generator)
    weight[:, 0] = torch.where(torch.arange(404) < 104, -1.0, 1.0)
    hidden[:, 0] = torch.where(targets < 104, -40.0, 40.0)
    hidden[130, 0] = 0.0  # one position of the second tile does not know its modality
    head = bench.Watched(linear_cross_entropy, "certified")
    losses = head(hidden.requires_grad_(), weight.requires_grad_(), targets, ranges=RANGES)
    below, work = head.take()
    left_out = (losses.skipped > 0).view(4, 128).any(dim=1)
    assert left_out.tolist() == [True, False, True, True]
    assert below == 0.75 and work == pytest.approx((0.25 + 1.0 + 2 * 0.75) / 4)
