"""Column- and row-parallel layers against one dense matrix: values, gradients, gradients left for later."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_ranks

from megat2i.parallel.collectives import TensorParallel
from megat2i.parallel.layers import ColumnParallelLinear, RowParallelLinear, WeightGradients

TOKENS, INPUTS, PARTS = 12, 8, (8, 8, 4)  # outputs of a column-parallel layer
OUTPUTS = sum(PARTS)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Case:
    """A dense layer with its gradients, and this rank's part of everything."""

    def __init__(self, kind: str, sequence: bool):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.parallel = TensorParallel(dist.group.WORLD, rank, ranks, sequence)
        self.gradients = WeightGradients()
        if kind == "column":
            layer = ColumnParallelLinear(INPUTS, PARTS, self.parallel, self.gradients)
        else:
            layer = RowParallelLinear(INPUTS, OUTPUTS, self.parallel, self.gradients)
        self.layer = layer.double()
        x, grad = numbers(0, TOKENS, INPUTS).requires_grad_(), numbers(2, TOKENS, OUTPUTS)
        dense = numbers(1, OUTPUTS, INPUTS).requires_grad_()
        out = x @ dense.T
        out.backward(grad)
        with torch.no_grad():
            self.layer.weight.copy_(layer.shard.cut(dense))
        self.weight_grad = layer.shard.cut(dense.grad)
        outputs = [range(OUTPUTS)[a:b] for a, b in layer.shard.pieces] if kind == "column" and ranks > 1 else []
        columns = [n for piece in outputs for n in piece] or list(range(OUTPUTS))
        inside = (slice(None), columns)  # of the products between column and row
        between = (slice(*self.parallel.share(TOKENS)),) if sequence else (slice(None),)
        if kind == "column":
            self.x, self.out, self.grad, self.x_grad = x[between], out[inside], grad[inside], x.grad[between]
        else:
            share = (slice(None), slice(*self.parallel.share(INPUTS)))
            self.x, self.out, self.grad, self.x_grad = x[share], out[between], grad[between], x.grad[share]
        self.x = self.x.detach().clone().requires_grad_()


def check_values_and_gradients(kind: str, sequence: bool) -> None:
    case = Case(kind, sequence)
    out = case.layer(case.x)
    torch.testing.assert_close(out, case.out)
    out.backward(case.grad)
    torch.testing.assert_close(case.x.grad, case.x_grad)
    torch.testing.assert_close(case.layer.weight.grad, case.weight_grad)
    assert not case.gradients.take()


def check_what_needs_no_gradient(kind: str, sequence: bool) -> None:
    case = Case(kind, sequence)
    case.layer.weight.requires_grad_(False)
    case.layer(case.x).backward(case.grad)
    torch.testing.assert_close(case.x.grad, case.x_grad)
    assert case.layer.weight.grad is None

    case = Case(kind, sequence)
    case.layer(case.x.detach()).backward(case.grad)
    torch.testing.assert_close(case.layer.weight.grad, case.weight_grad)


def check_deferral(kind: str, sequence: bool) -> None:
    """Left for later, the gradient is the same; it is added to what is there, and the weight's hooks run once each."""
    case, accumulated = Case(kind, sequence), []
    weight = case.layer.weight
    weight.register_post_accumulate_grad_hook(lambda parameter: accumulated.append(parameter))
    weight.grad = torch.ones_like(weight)
    for _ in range(2):
        case.gradients.deferring = True
        case.layer(case.x).backward(case.grad)
        case.gradients.deferring = False
    torch.testing.assert_close(case.x.grad, 2 * case.x_grad)
    assert (weight.grad == 1).all() and not accumulated
    left = case.gradients.take()
    assert len(left) == 2 and not case.gradients.take()
    for compute in left:
        compute()
    torch.testing.assert_close(weight.grad, 1 + 2 * case.weight_grad)
    assert len(accumulated) == 2


def check_nothing_is_deferred_that_would_be_lost(kind: str, sequence: bool) -> None:
    """An input without gradient (behind a frozen embedding), and a frozen weight."""
    case = Case(kind, sequence)
    case.gradients.deferring = True
    case.layer(case.x.detach()).backward(case.grad)
    torch.testing.assert_close(case.layer.weight.grad, case.weight_grad)
    case.layer.weight.requires_grad_(False)
    case.layer(case.x).backward(case.grad)
    torch.testing.assert_close(case.x.grad, case.x_grad)
    assert not case.gradients.take()


def check_not_computed(kind: str, sequence: bool) -> None:
    """``computed=False`` saves what ``computed=True`` saves, and neither multiplies nor sends."""
    case = Case(kind, sequence)

    def saved(computed: bool) -> list[torch.Tensor]:
        kept = []

        def keep(tensor):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = case.layer(case.x, computed=computed)
        assert out.numel() == (case.out.numel() if computed else 0)
        return kept

    expected = saved(True)

    def refuse(*_):
        raise AssertionError("something was sent")

    start_enter, start_leave = TensorParallel.start_enter, TensorParallel.start_leave
    TensorParallel.start_enter = TensorParallel.start_leave = refuse
    found = saved(False)
    TensorParallel.start_enter, TensorParallel.start_leave = start_enter, start_leave
    assert len(found) == len(expected) == 2
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


CHECKS = (
    check_values_and_gradients,
    check_what_needs_no_gradient,
    check_deferral,
    check_nothing_is_deferred_that_would_be_lost,
    check_not_computed,
)


def check_all(kind: str, sequence: bool) -> None:
    for check in CHECKS:
        try:
            check(kind, sequence)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_every_number_is_that_of_the_dense_layer(ranks, kind):
    def check():
        for sequence in (False, True):
            check_all(kind, sequence)

    run_ranks(ranks, check)


@pytest.mark.parametrize(("kind", "sequence"), product(["column", "row"], [False, True]))
def test_a_missing_collective_is_noticed(kind, sequence):
    def check():
        TensorParallel.start_enter = lambda self, x: (x.repeat(self.size, 1) if self.sequence else x, None)
        TensorParallel.start_leave = lambda self, x: (
            x[slice(*self.share(len(x)))].contiguous() if self.sequence else x,
            None,
        )
        check_values_and_gradients(kind, sequence)

    with pytest.raises(RankError, match="not close"):
        run_ranks(2, check)


def test_parts_are_cut_one_by_one():
    for rank in range(2):
        layer = ColumnParallelLinear(INPUTS, PARTS, TensorParallel(None, rank, 2), WeightGradients())
        assert layer.shard.pieces == ((0, 4), (8, 12), (16, 18)) if rank == 0 else ((4, 8), (12, 16), (18, 20))
        assert tuple(layer.weight.shape) == (10, INPUTS)
    assert RowParallelLinear(INPUTS, 6, TensorParallel(None, 1, 4), WeightGradients()).shard.pieces == ((2, 4),)
    with pytest.raises(ValueError, match="does not divide"):
        ColumnParallelLinear(INPUTS, (6, 8), TensorParallel(None, 0, 4), WeightGradients())
