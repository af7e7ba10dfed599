"""The norm over heads that ranks share, against the norm of the whole vector: values, gradients, accuracy."""

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_ranks

from megat2i.kernels import choose_ops, reference
from megat2i.model import layers
from megat2i.model.layers import HeadsNorm
from megat2i.parallel.collectives import TensorParallel

TOKENS, WIDTH, EPS = 6, 32, 1e-5
KINDS = ("layer_norm", "layer_norm_gain_only", "rms_norm")


def dense(x, weight, bias, kind):
    return reference.rms_norm(x, weight, EPS) if kind == "rms_norm" else reference.layer_norm(x, weight, bias, EPS)


def make(kind: str, parallel: TensorParallel, dtype: torch.dtype) -> HeadsNorm:
    return HeadsNorm(WIDTH, kind, EPS, choose_ops(torch.device("cpu"), dtype), parallel).to(dtype)


def numbers(kind: str, offset: str, dtype: torch.dtype):
    """x [N, D], gain, bias and the gradient of the result. ``offset``: what the vectors' mean is."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    x += {"none": 0.0, "common": 1000.0, "of each head": torch.linspace(-50, 50, 8).repeat_interleave(4)}[offset]
    return [value.to(dtype) for value in (x, weight, bias if kind == "layer_norm" else None, grad) if value is not None]


def on_this_rank(kind: str, offset: str, dtype: torch.dtype) -> tuple[list, list]:
    """(found, expected): the result and the gradients of x, gain and bias; expected ones in float64."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parallel = TensorParallel(dist.group.WORLD, rank, ranks)
    norm = make(kind, parallel, dtype)
    x, weight, *bias, grad = numbers(kind, offset, dtype)
    wide = [value.double().clone().requires_grad_() for value in (x, weight, *bias)]
    out = dense(wide[0], wide[1], wide[2] if bias else None, kind)
    out.backward(grad.double())
    mine = slice(*parallel.share(WIDTH))
    for parameter, value in zip(norm.parameters(), (weight, *bias), strict=True):
        parameter.data.copy_(value[mine])
    part = x[:, mine].clone().requires_grad_()
    result = norm(part)
    result.backward(grad[:, mine])
    found = [result, part.grad, *(parameter.grad for parameter in norm.parameters())]
    return found, [value[..., mine] for value in (out, *(value.grad for value in wide))]


def check(kind: str, dtype: torch.dtype, bounds: dict[str, float]) -> None:
    for offset, bound in bounds.items():
        found, expected = on_this_rank(kind, offset, dtype)
        for name, mine, theirs in zip(("result", "x", "gain", "bias"), found, expected, strict=False):
            error = ((mine - theirs).norm() / theirs.norm()).item()
            assert error < bound, f"{name}, mean {offset}, {dtype}: {error:.1e}"


# The mean of numbers around 1000 is known to half of 6e-5 in float32, with a spread of 1.
BOUNDS = {
    torch.float64: {"none": 1e-15, "common": 1e-12, "of each head": 1e-15},
    torch.float32: {"none": 5e-7, "common": 2e-4, "of each head": 5e-7},
    torch.bfloat16: {"none": 6e-3},
}


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_normalise_as_one(ranks, kind):
    run_ranks(ranks, lambda: [check(kind, dtype, bounds) for dtype, bounds in BOUNDS.items()])


def broken(mistake, kind: str, bounds: dict[str, float]) -> str:
    """What a check with ``mistake`` says."""

    def run():
        mistake()
        check(kind, torch.float32, bounds)

    with pytest.raises(RankError) as caught:
        run_ranks(2, run)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_a_ranks_own_heads_are_noticed(kind):
    def mistake():
        layers.gather_statistics = lambda x, parallel: x[None]

    assert "result, mean none" in broken(mistake, kind, BOUNDS[torch.float32])


@pytest.mark.parametrize("kind", ["layer_norm", "layer_norm_gain_only"])
def test_the_variance_as_a_difference_of_squares_is_noticed(kind):
    """E[x^2] - E[x]^2 is right on paper, and lost where the mean is large."""

    def mistake():
        def forward(self, x):
            sums = layers.gather_statistics(torch.cat((x, x.square()), 1).view(len(x), 2, -1).mean(-1), self.parallel)
            mean, square = sums.mean(0).split(1, dim=-1)
            normed = (x - mean) * torch.rsqrt((square - mean.square()).clamp(min=0) + self.eps) * self.weight
            return normed if self.bias is None else normed + self.bias

        HeadsNorm.forward = forward

    assert "mean common" in broken(mistake, kind, {"none": 1e-5, "common": 1e-4})
