"""Every collective and its conjugate against dense computing: values, and gradients of the sum of all ranks' losses."""

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_ranks

from megat2i.parallel import collectives
from megat2i.parallel.collectives import (
    ALONE,
    TensorParallel,
    gather_statistics,
    gather_tokens,
    leave,
    shared_parameter,
)

TOKENS, WIDTH = 8, 3


def parallel_of_all(sequence: bool) -> TensorParallel:
    return TensorParallel(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), sequence)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mine(x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """This rank's tokens of [N, ...]."""
    return x[slice(*parallel.share(len(x)))]


def check_leave(sequence: bool) -> None:
    parallel, (rank, ranks) = parallel_of_all(sequence), (dist.get_rank(), dist.get_world_size())
    partials = [numbers(seed, TOKENS, WIDTH).requires_grad_() for seed in range(ranks)]
    weight = numbers(99, TOKENS, WIDTH)
    dense = torch.stack(partials).sum(0)
    (dense * weight).sum().backward()
    partial = partials[rank].detach().clone().requires_grad_()
    out = leave(partial * 1, parallel)  # of an intermediate result: the sum is made in its place
    torch.testing.assert_close(out, mine(dense, parallel) if sequence else dense)
    # without sequence parallelism every rank computes the same loss; with it each that of its own tokens
    (out * (mine(weight, parallel) if sequence else weight)).sum().backward()
    torch.testing.assert_close(partial.grad, partials[rank].grad)


def check_gather_tokens() -> None:
    """Every rank computes the whole loss and its whole gradient."""
    parallel = parallel_of_all(sequence=True)
    whole, weight = numbers(0, TOKENS, WIDTH), numbers(99, TOKENS, WIDTH)
    part = mine(whole, parallel).clone().requires_grad_()
    out = gather_tokens(part, parallel)
    torch.testing.assert_close(out, whole)
    (out * weight).sum().backward()
    torch.testing.assert_close(part.grad, mine(weight, parallel))


def check_shared_parameter() -> None:
    """Every rank applies it to its own tokens."""
    parallel = parallel_of_all(sequence=True)
    x = numbers(0, TOKENS, WIDTH)
    parameter, dense = numbers(1, WIDTH).requires_grad_(), numbers(1, WIDTH).requires_grad_()
    (x * dense).square().sum().backward()
    (mine(x, parallel) * shared_parameter(parameter, parallel)).square().sum().backward()
    torch.testing.assert_close(parameter.grad, dense.grad)


def check_gather_statistics() -> None:
    """Every rank makes another use of all ranks' numbers."""
    parallel, (rank, ranks) = parallel_of_all(sequence=False), (dist.get_rank(), dist.get_world_size())
    parts = [numbers(seed, TOKENS, 2).requires_grad_() for seed in range(ranks)]
    uses = [numbers(50 + seed, ranks, TOKENS, 2) for seed in range(ranks)]
    dense = torch.stack(parts)
    torch.stack([(dense * use).square().sum() for use in uses]).sum().backward()
    part = parts[rank].detach().clone().requires_grad_()
    out = gather_statistics(part, parallel)
    torch.testing.assert_close(out, dense)
    (out * uses[rank]).square().sum().backward()
    torch.testing.assert_close(part.grad, parts[rank].grad)


CHECKS = {
    "leave": lambda: check_leave(sequence=False),
    "leave, sequence": lambda: check_leave(sequence=True),
    "gather tokens": check_gather_tokens,
    "shared parameter": check_shared_parameter,
    "gather statistics": check_gather_statistics,
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_values_and_gradients(ranks):
    def check():
        for name, function in CHECKS.items():
            try:
                function()
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error

    run_ranks(ranks, check)


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_notice_that_nothing_is_sent(name):
    def broken():
        TensorParallel.start_reduce = lambda self, x: (x, None)
        TensorParallel.start_gather = lambda self, x: (x.repeat(self.size, 1), None)
        TensorParallel.start_reduce_scatter = lambda self, x: (mine(x, self).clone(), None)
        CHECKS[name]()

    with pytest.raises(RankError, match="not close"):
        run_ranks(2, broken)


def test_what_is_gathered_may_lie_anywhere_in_memory():
    def check():
        parallel = parallel_of_all(sequence=True)
        whole = numbers(0, WIDTH, TOKENS).T
        assert not whole.is_contiguous()
        torch.testing.assert_close(collectives.finished(parallel.start_gather(mine(whole, parallel))), whole)
        scattered = collectives.finished(parallel.start_reduce_scatter(whole))
        torch.testing.assert_close(scattered, 2 * mine(whole, parallel))
        torch.testing.assert_close(collectives.finished(parallel.start_reduce(whole)), 2 * whole)

    run_ranks(2, check)


def test_alone_nothing_is_copied_or_sent():
    x = numbers(0, TOKENS, WIDTH)
    for function in (leave, gather_tokens, shared_parameter):
        assert function(x, ALONE) is x
    for start in (ALONE.start_gather, ALONE.start_reduce, ALONE.start_reduce_scatter):
        assert start(x)[0] is x and start(x)[1] is None


def test_shares():
    assert [TensorParallel(None, rank, 4).share(12) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    with pytest.raises(ValueError, match="10 does not divide into 4 tensor-parallel parts"):
        TensorParallel(None, 0, 4).share(10)
