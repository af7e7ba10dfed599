"""The guards themselves, and the interpreted kernels between them: nothing is written beside an output."""

import tempfile
from pathlib import Path

import pytest
import torch
from block_cases import CASES as BLOCK_CASES
from block_cases import check as check_block
from guarded import guarded
from head_cases import Case, broken_kernels, check
from interpreted import interpreter

HEAD_CASE = Case(torch.float32, mode="certified", confident=True, tokens=129)


@pytest.fixture(scope="module")
def interpret():
    with interpreter() as call:
        yield call


def test_a_write_beside_an_output_is_noticed():
    for offset in (-1, 6):
        with pytest.raises(AssertionError, match="beside an output of 24 bytes"), guarded():
            made = torch.empty((2, 3))
            made.zero_()
            made.as_strided((1,), (1,), made.storage_offset() + offset).fill_(1.0)
    with guarded():
        assert torch.empty(2, 3, dtype=torch.bfloat16).isnan().all() and (torch.ones(3).new_zeros((4,)) == 0).all()


def between_guards() -> None:
    with guarded():
        check(HEAD_CASE, "triton")
    for name in ("layer_norm gain only bf16", "swiglu bf16", "each head"):
        with guarded():
            check_block(BLOCK_CASES[name])


def test_kernels_write_their_outputs_alone(interpret):
    interpret(between_guards)


def stray() -> None:
    """The head with a kernel that forgets where its rows end."""
    from megat2i.kernels.linear_cross_entropy import triton_head

    with tempfile.TemporaryDirectory() as folder:
        own = "tl.store(largest + column_tile * rows + row, tl.max(exponent, axis=1), mask=row < rows)"
        triton_head.kernels = broken_kernels(own, own.replace("mask=row < rows", "mask=row < rows + 9"), Path(folder))
        with guarded():
            check(HEAD_CASE, "triton")


def test_a_kernel_that_writes_too_far_is_noticed(interpret):
    with pytest.raises(AssertionError, match="beside an output"):
        interpret(stray)
