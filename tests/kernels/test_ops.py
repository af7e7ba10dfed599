"""The chosen ops against their plain twins."""

import pytest
import torch

from megat2i.kernels import choose_ops, describe, reference
from megat2i.kernels.attention import document_mask

# Largest relative L2 error of results and gradients against float64 on the same numbers.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = list(BOUNDS)


def differences(name, make_arguments, dtype, options=(), functions=None):
    """Relative L2 errors of the result and of the gradient of every tensor argument, of op ``name``."""
    function, twin = functions or (getattr(choose_ops(torch.device("cpu"), dtype), name), getattr(reference, name))
    arguments = [tensor.to(dtype) for tensor in make_arguments(torch.Generator().manual_seed(0))]
    results = []
    for call, kind in ((function, dtype), (twin, torch.float64)):
        inputs = [tensor.to(kind).requires_grad_() for tensor in arguments]
        result = call(*inputs, *options)
        assert result.dtype == kind
        upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(kind)
        gradients = torch.autograd.grad(result, inputs, upstream)
        results.append([tensor.double() for tensor in (result, *gradients)])
    return [((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]


def normal(*shape, offset=0.0):
    return lambda generator: torch.randn(*shape, generator=generator) + offset


def norm_arguments(with_bias):
    def make(generator):
        x, weight, bias = (
            normal(*shape, offset=o)(generator) for shape, o in (((3, 5, 24), 2), ((24,), 1), ((24,), 0))
        )
        return [x, weight, bias] if with_bias else [x, weight]

    return make


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype):
    assert max(differences("layer_norm", norm_arguments(True), dtype, (1e-5,))) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_without_bias(dtype):
    def without_bias(function):
        return lambda x, weight, eps: function(x, weight, None, eps)

    ops = choose_ops(torch.device("cpu"), dtype)
    functions = (without_bias(ops.layer_norm), without_bias(reference.layer_norm))
    assert max(differences("layer_norm", norm_arguments(False), dtype, (1e-5,), functions)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    assert max(differences("rms_norm", norm_arguments(False), dtype, (1e-5,))) < BOUNDS[dtype]


def test_the_comparison_notices_the_wrong_norm():
    ops = choose_ops(torch.device("cpu"), torch.float32)
    functions = (ops.rms_norm, lambda x, weight, eps: reference.layer_norm(x, weight, None, eps))
    assert min(differences("", norm_arguments(False), torch.float32, (1e-5,), functions)[:2]) > 0.1
    other_eps = (lambda x, weight: ops.rms_norm(x, weight, 1e-3), lambda x, weight: reference.rms_norm(x, weight, 1e-5))
    assert max(differences("", norm_arguments(False), torch.float32, (), other_eps)) > BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    def make(generator):
        return [normal(4, 7, 16)(generator), normal(4, 7, 16)(generator)]

    assert max(differences("swiglu", make, dtype)) < BOUNDS[dtype]
    swapped = (reference.swiglu, lambda gate, up: reference.swiglu(up, gate))
    assert max(differences("", make, dtype, (), swapped)) > 0.1


def qkv(generator):
    return [normal(2, 3, 9, 8)(generator) for _ in range(3)]


def some_mask():
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    return mask | torch.eye(9, dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention(dtype, masked):
    options = (some_mask(),) if masked else ()
    bound = 2e-2 if dtype == torch.bfloat16 else BOUNDS[dtype]
    assert max(differences("attention", qkv, dtype, options)) < bound


def test_the_comparison_notices_another_mask():
    other = some_mask().roll(1, dims=-1) | torch.eye(9, dtype=torch.bool)
    ops = choose_ops(torch.device("cpu"), torch.float32)
    functions = (lambda q, k, v: ops.attention(q, k, v, other), reference.attention)
    assert max(differences("", qkv, torch.float32, (), functions)) > 0.1


def angles(positions, width, base=10_000.0):
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.as_tensor(positions, dtype=torch.float64)[:, None] * frequency


def test_rotary_turns_pairs_of_the_two_halves():
    width, positions = 8, [0, 1, 5, 40]
    angle = angles(positions, width)
    x = torch.randn(2, 3, 4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    ops = choose_ops(torch.device("cpu"), torch.float64)
    found = ops.rotary(x, angle.cos(), angle.sin())
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[:, :, 0], x[:, :, 0])
    interleaved = torch.view_as_complex(x.unflatten(-1, (width // 2, 2))) * torch.polar(torch.ones_like(angle), angle)
    assert (torch.view_as_real(interleaved).flatten(-2) - found).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_scores_depend_on_the_distance_alone(dtype):
    ops, width = choose_ops(torch.device("cpu"), dtype), 16
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, width, generator=generator).to(dtype) for _ in range(2))

    def score(at_q, at_k):
        turned = [
            ops.rotary(x, angles([at], width).cos().float(), angles([at], width).sin().float()).double()
            for x, at in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum().item()

    bound = 0.1 if dtype == torch.bfloat16 else 1e-5
    assert ops.rotary(q, angles([3], width).cos().float(), angles([3], width).sin().float()).dtype == dtype
    assert abs(score(7, 3) - score(104, 100)) < bound
    assert abs(score(7, 3) - score(8, 3)) > 2 * bound


def test_forcing_an_implementation():
    cpu = torch.device("cpu")
    forced = choose_ops(cpu, torch.float32, "reference")
    assert forced.layer_norm is reference.layer_norm and forced.attention is reference.attention
    assert "block=reference head=reference" in forced.description
    assert "block=triton head=triton" in choose_ops(cpu, torch.float32, "triton").description
    assert "block=chunked head=chunked" in choose_ops(cpu, torch.bfloat16).description
    with pytest.raises(ValueError, match="'cuda' is not one of reference, chunked, triton"):
        choose_ops(cpu, torch.float32, "cuda")


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm", "qk_norm_rope"])
def test_pytorchs_own_operations_equal_the_twins(name):
    ops, generator = choose_ops(torch.device("cpu"), torch.float32), torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 8), (2, 3, 8), (8,)))
    table = torch.rand(3, 2, generator=generator)
    arguments = {
        "add_layer_norm": (x, residual, weight, None, 1e-5),
        "add_rms_norm": (x, residual, weight, 1e-5),
        "qk_norm_rope": (x, residual, table, table, 2),
    }[name]
    for found, expected in zip(getattr(ops, name)(*arguments), getattr(reference, name)(*arguments), strict=True):
        torch.testing.assert_close(found, expected)


def test_describe_names_every_op_and_why(monkeypatch):
    text = describe(torch.device("cpu"), torch.float32)
    for word in ("linear_cross_entropy", "norms", "qk_norm_rope", "rotary", "swiglu", "attention", "AdamW", "a CPU"):
        assert word in text
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted" in describe(torch.device("cpu"), torch.float32)


def test_document_mask():
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 1]]))[0, 0]
    expected = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
    assert torch.equal(mask, expected.bool())
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=generator) for _ in range(3))
    packed = choose_ops(torch.device("cpu"), torch.float32).attention(q, k, v, mask)
    alone = reference.attention(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:])
    torch.testing.assert_close(packed[:, :, 2:], alone)
    assert (reference.attention(q, k, v)[:, :, 2:] - alone).abs().max() > 0.1
