"""bfloat16 in Triton's interpreter, with our patch and without."""

import pytest
import torch
from interpreted import interpreter


def measure(patched: bool) -> tuple[float, float]:
    """(share of casts that differ from PyTorch's, relative error of a product) for bfloat16 in the interpreter."""
    import triton

    if patched:
        from megat2i.kernels import interpreter as patch

        patch.install()
        patch.install()  # once more changes nothing
    from interpreter_kernels import cast, multiply

    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator, dtype=torch.int64).int()
    ties = (torch.arange(1 << 10, dtype=torch.int32) << 16) + 0x8000
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-40, -1e-45]).view(torch.int32)
    values = torch.cat((bits, ties, special)).view(torch.float32)
    values = values[~values.isnan()].contiguous()
    found = torch.empty(len(values), dtype=torch.bfloat16)
    cast[(1,)](values, found, len(values), triton.next_power_of_2(len(values)))
    wrong = (found.view(torch.int16) != values.bfloat16().view(torch.int16)).float().mean().item()
    a, b = (torch.randn(128, 128, generator=generator).bfloat16() for _ in range(2))
    product, not_a_number = torch.empty(128, 128), torch.empty(1, dtype=torch.bfloat16)
    multiply[(1,)](a, b, product, 128)
    cast[(1,)](torch.full((1,), float("nan")), not_a_number, 1, 16)
    expected = a.double() @ b.double()
    error = ((product.double() - expected).norm() / expected.norm()).item()
    return wrong + (0.0 if not_a_number.isnan() else 1.0), error


def test_casts_round_and_products_multiply():
    with interpreter() as call:
        wrong, error = call(measure, True)
    assert wrong == 0 and error < 2e-3


def test_the_comparison_notices_the_interpreter_as_it_comes():
    with interpreter() as call:
        wrong, error = call(measure, False)
    assert wrong > 0.3 and not error < 1.0


def without_a_part():
    """Install the patch over an interpreter that lacks what it replaces."""
    from triton.runtime.interpreter import InterpreterBuilder

    from megat2i.kernels import interpreter as patch

    InterpreterBuilder.cast_impl.rounds_bfloat16 = False
    del InterpreterBuilder.create_dot
    patch.install()


def test_another_interpreter_is_refused():
    with interpreter() as call, pytest.raises(RuntimeError, match="has no create_dot"):
        call(without_a_part)
