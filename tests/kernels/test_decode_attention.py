"""Attention of one query a row over a cache: interpreted and compiled ahead of time, against float64."""

import pytest
import torch
from ahead_of_time import SHARED_MEMORY, compile_for
from interpreted import interpreter

from megat2i.kernels import reference

# (rows, query heads, heads of keys, length, width, place of the token, places where the rows begin)
CASES = {
    "several blocks": (3, 4, 4, 208, 32, 150, (0, 17, 150)),
    "grouped, odd width": (2, 6, 2, 80, 24, 63, (0, 62)),
    "the first token": (2, 2, 2, 16, 8, 0, (0, 0)),
    "the last place, a row of padding": (2, 2, 1, 64, 16, 63, (1, 64)),
}
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def tensors(name: str, dtype: torch.dtype, device: str = "cpu"):
    rows, heads, kv_heads, length, width, place, first = CASES[name]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, 1, heads, width, generator=generator).transpose(1, 2)
    keys, values = (3 * torch.randn(rows, kv_heads, length, width, generator=generator) for _ in range(2))
    q, keys, values = (t.to(device, dtype) for t in (q, keys, values))
    return q, keys, values, torch.tensor(first, device=device), torch.tensor([place], device=device)


def error(name: str, dtype: torch.dtype, device: str = "cpu", moved: int = 0) -> float:
    """Relative 2-norm of the difference from the twin in float64; places not to be read hold NaN."""
    from megat2i.kernels.decode_attention import decode_attention

    q, keys, values, first, place = tensors(name, dtype, device)
    at = torch.arange(keys.shape[2], device=device)
    unseen = (at < torch.minimum(first, place)[:, None]) | (at > place)
    expected = reference.decode_attention(q.double(), keys.double(), values.double(), first, place + moved)
    for cache in (keys, values):
        cache.masked_fill_(unseen[:, None, :, None], float("nan"))
    found = decode_attention(q, keys, values, first, place).double()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def interpret():
    with interpreter() as call:
        yield call


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_it_equals_float64_and_reads_what_is_seen_alone(interpret, name, dtype):
    assert interpret(error, name, dtype) < BOUNDS[dtype]


def test_another_place_is_noticed(interpret):
    assert interpret(error, "several blocks", torch.float32, "cpu", -1) > 1e-3


def test_the_twin_is_attention_over_the_seen_keys():
    q, keys, values, first, place = tensors("several blocks", torch.float32)
    found = reference.decode_attention(q, keys, values, first, place)
    for row, begin in enumerate(first.tolist()):
        k, v = (t[row : row + 1, :, begin : place.item() + 1] for t in (keys, values))
        whole = torch.ones(1, k.shape[2], dtype=torch.bool)
        torch.testing.assert_close(found[row : row + 1], reference.attention(q[row : row + 1], k, v, whole))


@pytest.mark.parametrize("chip", SHARED_MEMORY)
def test_it_compiles_within_the_chips_resources(chip):
    from megat2i.kernels import decode_attention_kernels as kernels

    types = dict.fromkeys(("q", "keys", "values", "out"), "*bf16") | dict.fromkeys(("first", "position"), "*i64")
    types |= dict.fromkeys(("heads", "group", "length", "width", "stride_row", "stride_head"), "i32")
    constants = {"BLOCK": kernels.BLOCK, "WIDTH": 128, "num_warps": kernels.WARPS}
    found = compile_for(chip, kernels.decode_attention, types | {"scale": "fp32"}, constants)
    assert found.stack == 0 and found.vector_loads > 0 and found.shared <= SHARED_MEMORY[chip]


def test_a_cache_that_is_cut_is_refused(interpret):
    with pytest.raises(ValueError, match="contiguous"):
        interpret(cut)


def cut():
    from megat2i.kernels.decode_attention import decode_attention

    q, keys, values, *where = tensors("several blocks", torch.float32)
    decode_attention(q, keys[:, :, :160], values[:, :, :160], *where)
