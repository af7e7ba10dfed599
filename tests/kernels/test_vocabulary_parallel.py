"""The loss head over a sharded vocabulary: the same numbers and gradients as one rank that holds all rows."""

import importlib

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_ranks
from interpreted import interpreter

from megat2i.kernels import linear_cross_entropy

MODULE = importlib.import_module("megat2i.kernels.linear_cross_entropy.chunked")
RANGES = ((0, 37), (48, 90))  # text with specials, and image codes; unused rows behind each
BLOCKS = ((48, 96), (0, 48))  # each rank holds its share of the image rows first, then of the text rows
TOKENS, WIDTH, ROWS = 61, 16, 96


def make_case():
    generator = torch.Generator().manual_seed(0)
    live = torch.cat([torch.arange(start, end) for start, end in RANGES])
    targets = live[torch.randint(0, len(live), (TOKENS,), generator=generator)]
    targets[::5] = -100
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(ROWS, WIDTH, generator=generator) * 2
    token_weight = torch.rand(TOKENS, generator=generator)
    return hidden, weight, targets, token_weight


def share(table: torch.Tensor, rank: int, ranks: int, blocks=BLOCKS) -> torch.Tensor:
    """The rows of rank ``rank``: its part of each block."""
    return torch.cat([table[start:end].chunk(ranks)[rank] for start, end in blocks])


def run(hidden, weight, targets, token_weight, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = linear_cross_entropy(
        hidden, weight, targets, ranges=RANGES, z_loss=1e-2, token_weight=token_weight, **options
    )
    losses.loss.sum().backward()
    return [values.detach() for values in losses], hidden.grad, weight.grad


def check_rank(chunk_elements: int, blocks=BLOCKS) -> None:
    """On every rank: compare its results with those of the whole table."""
    hidden, weight, targets, token_weight = make_case()
    expected, expected_hidden, expected_weight = run(hidden, weight, targets, token_weight)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    MODULE.CHUNK_ELEMENTS = chunk_elements
    local = share(weight, rank, ranks, blocks)
    found, found_hidden, found_weight = run(hidden, local, targets, token_weight, blocks=BLOCKS, group=dist.group.WORLD)
    for name, mine, theirs in zip(("loss", "nll", "lse", "correct", "off", "skipped"), found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    for mine, theirs in ((found_hidden, expected_hidden), (found_weight, share(expected_weight, rank, ranks))):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("chunk_elements", [1 << 23, 300])
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_numbers_of_one(ranks, chunk_elements):
    run_ranks(ranks, check_rank, chunk_elements)


def test_rows_in_another_order_are_noticed():
    with pytest.raises(RankError, match="loss"):
        run_ranks(2, check_rank, 1 << 23, BLOCKS[::-1])


def test_a_missing_reduction_of_the_hidden_gradient_is_noticed(monkeypatch):
    class Done:
        def wait(self):
            pass

    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: Done())
    with pytest.raises(RankError):
        run_ranks(2, check_rank, 1 << 23)


def test_blocks_that_do_not_divide_are_refused():
    def odd():
        hidden, weight, targets, _ = make_case()
        with pytest.raises(ValueError, match="does not divide into 2 equal parts"):
            linear_cross_entropy(
                hidden, weight[:48], targets, ranges=RANGES, blocks=((0, 47), (47, 96)), group=dist.group.WORLD
            )

    run_ranks(2, odd)


@pytest.mark.parametrize("mode", ["certified", "masked"])
def test_the_other_modes_over_ranks(mode):
    def check():
        hidden, weight, targets, token_weight = make_case()
        expected, expected_hidden, expected_weight = run(hidden, weight, targets, token_weight, mode=mode, delta=0.9)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        local = share(weight, rank, ranks)
        found = run(hidden, local, targets, token_weight, blocks=BLOCKS, group=dist.group.WORLD, mode=mode, delta=0.9)
        for mine, theirs in zip(found[0], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert (found[1] - expected_hidden).norm() < 1e-5 * expected_hidden.norm()
        assert (found[2] - share(expected_weight, rank, ranks)).norm() < 1e-5 * expected_weight.norm()

    run_ranks(2, check)


def interpreted_ranks(ranks: int) -> None:
    """In the interpreting process: the Triton form over ranks against the chunked form on one."""

    def check():
        hidden, weight, targets, token_weight = make_case()
        expected = run(hidden, weight, targets, token_weight, implementation="chunked")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        local = share(weight, rank, ranks)
        found = run(
            hidden, local, targets, token_weight, blocks=BLOCKS, group=dist.group.WORLD, implementation="triton"
        )
        for mine, theirs in zip(found[0], expected[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()
        assert (found[2] - share(expected[2], rank, ranks)).norm() < 1e-5 * expected[2].norm()

    run_ranks(ranks, check)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_the_triton_form_over_ranks(ranks):
    with interpreter() as call:
        call(interpreted_ranks, ranks)
