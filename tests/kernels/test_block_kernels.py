"""The block's Triton kernels, interpreted, against float64; as custom ops; and compiled."""

import pytest
import torch
from block_cases import CASES, MORE, arguments, check, errors, norm
from interpreted import interpreter

from megat2i.kernels import reference


@pytest.fixture(scope="module")
def interpret():
    with interpreter() as call:
        yield call


def check_all(cases) -> dict[str, str]:
    """Messages of the cases that fail."""
    failures = {}
    for name, case in cases.items():
        try:
            check(case)
        except AssertionError as error:
            failures[name] = str(error)
    return failures


def test_kernels_equal_float64(interpret):
    assert interpret(check_all, CASES) == {}


@pytest.mark.full
def test_kernels_equal_float64_in_more_cases(interpret):
    assert interpret(check_all, MORE) == {}


def other_eps(x, weight, bias, eps):
    return reference.layer_norm(x, weight, bias, 1e-2)


def test_the_comparison_notices_another_eps(interpret):
    assert max(interpret(errors, CASES["layer_norm"], "cpu", other_eps)) > 1e-3


def unrotated(q, k, cosine, sine, heads, **options):
    return reference.qk_norm_rope(q, k, cosine, -sine, heads, **options)


def test_the_comparison_notices_the_other_direction_of_rotation(interpret):
    assert min(interpret(errors, CASES["whole vector bf16"], "cpu", unrotated)[:3]) > 0.1


def opcheck_all() -> None:
    from megat2i.kernels.norm import norm_op
    from megat2i.kernels.qk_norm_rope import norm_rope_op
    from megat2i.kernels.swiglu import swiglu

    for bias in (None, torch.randn(8)):
        x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
        gains = [None if t is None else t.requires_grad_() for t in (weight, bias)]
        for other in (None, residual.requires_grad_()):
            torch.library.opcheck(norm_op, (x.requires_grad_(), other, *gains, 1e-5, True))
        q = torch.randn(2, 3, 8, requires_grad=True)
        torch.library.opcheck(norm_rope_op, (q, *gains, torch.rand(3, 2), torch.rand(3, 2), 2, 1e-5, True))
    torch.library.opcheck(norm_rope_op, (q, None, None, torch.rand(3, 2), torch.rand(3, 2), 2, 1e-5, True))
    torch.library.opcheck(swiglu, (torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)))


def test_they_are_sound_custom_ops(interpret):
    interpret(opcheck_all)


def compiled() -> list[float]:
    """Differences of a piece of a block compiled into one graph from the same piece run eagerly."""
    from megat2i.kernels.norm import add_layer_norm, layer_norm
    from megat2i.kernels.qk_norm_rope import qk_norm_rope
    from megat2i.kernels.swiglu import swiglu

    def piece(x, weight, cosine):
        normed = layer_norm(x, weight, None, 1e-5)
        q, k = qk_norm_rope(normed, normed * 2, cosine, cosine, 2, q_weight=weight, k_weight=weight)
        mixed = (q * k).transpose(1, 2).flatten(2)
        normed, total = add_layer_norm(mixed, x, weight, None, 1e-5)
        return total + swiglu(*normed.repeat(1, 1, 2).chunk(2, dim=-1))

    generator = torch.Generator().manual_seed(0)
    x, weight, cosine = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 8), (8,), (3, 2)))
    results = []
    for function in (piece, torch.compile(piece, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        result = function(*leaves, cosine)
        result.square().sum().backward()
        results.append([result.detach(), *(leaf.grad for leaf in leaves)])
    return [((a - b).norm() / a.norm()).item() for a, b in zip(*results, strict=True)]


def test_they_compile_into_one_graph(interpret):
    assert max(interpret(compiled)) < 1e-6


def wrong_shapes() -> list[str]:
    from megat2i.kernels.norm import layer_norm
    from megat2i.kernels.qk_norm_rope import qk_norm_rope
    from megat2i.kernels.swiglu import swiglu

    messages = []
    for call in (
        lambda: layer_norm(torch.randn(2, 20_000), torch.randn(20_000), None, 1e-5),
        lambda: qk_norm_rope(torch.randn(1, 2, 10), torch.randn(1, 2, 10), None, None, 3),
        lambda: qk_norm_rope(torch.randn(1, 2, 8), torch.randn(1, 2, 8), None, None, 2, q_weight=torch.randn(3)),
        lambda: swiglu(torch.randn(2, 3), torch.randn(2, 4)),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_wrong_shapes(interpret):
    messages = interpret(wrong_shapes)
    for message, part in zip(messages, ("16,384", "3 heads", "weight of 3", "must be alike"), strict=True):
        assert part in message


def sums_repeat() -> bool:
    """Whether the gradient of a gain is the same in two runs."""
    from megat2i.kernels.norm import layer_norm

    case = norm("layer_norm", (65, 96), True, torch.bfloat16)
    gradients = []
    for _ in range(2):
        positional, _, taking = arguments(case, "cpu")
        gradients.append(torch.autograd.grad(layer_norm(*positional).float().square().sum(), taking))
    return all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sums_over_rows_repeat(interpret):
    assert interpret(sums_repeat)
