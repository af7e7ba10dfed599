"""What our kernels read and write: the planner's passes against every operation that the real layers call."""

from dataclasses import replace

import pytest
import torch
from meta_block import CHANGES, SHAPE, TOKENS, block_model, forward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megat2i.config import ModelConfig
from megat2i.planner import system
from megat2i.planner.system import Passes, ours

# matrix products, attention, and what moves nothing
NOT_ELEMENTWISE = {
    "mm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward", "_unsafe_view",
    "empty", "empty_like", "new_empty",
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Sums the bytes that elementwise operations read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if not (function.is_view or name in NOT_ELEMENTWISE):
            read = list(args)
            if name == "norm_rope_backward" and args[2] is None:
                del read[1]  # without a norm the kernel does not read its input
            tensors = [leaf for leaf in tree_leaves((read, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return result


def layer_traffic(shape: ModelConfig, apart: bool = False) -> tuple[float, float]:
    """Bytes of one token of one layer, forward and backward."""
    counted = []
    for layers in (1, 2):
        model = block_model(replace(shape, layers=layers), apart=apart)
        with Traffic() as forth:
            out = forward(model)
        with Traffic() as back:
            out.backward(torch.empty_like(out))
        counted.append((forth.bytes, back.bytes))
    return tuple((two - one) / TOKENS for one, two in zip(*counted, strict=True))


def predicted(shape: ModelConfig, tensor: int = 1) -> tuple[float, float]:
    ours_here = ours(shape, tensor)
    return ours_here.forward.bytes(shape, 1, False), ours_here.backward.bytes(shape, 1, False)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_layer_moves_what_is_counted(change):
    shape = replace(SHAPE, **change)
    assert layer_traffic(shape) == pytest.approx(predicted(shape), rel=0.02)  # gains and tables are not counted


def test_queries_and_keys_normed_over_several_ranks():
    shape = replace(SHAPE, qk_norm=True)
    assert layer_traffic(shape, apart=True) == pytest.approx(predicted(shape, tensor=2), rel=0.02)


def test_the_count_tells_one_pass_more():
    """Negative control."""
    forth, _ = layer_traffic(SHAPE)
    passes = ours(SHAPE, 1).forward
    for more in (Passes(1, 0, 0), Passes(0, 1, 0), Passes(0, 0, 1)):
        wrong = Passes(*(a + b for a, b in zip(vars(passes).values(), vars(more).values(), strict=True)))
        assert forth != pytest.approx(wrong.bytes(SHAPE, 1, False), rel=0.02)


def test_the_head_s_chunk_is_that_of_the_kernel():
    pytest.importorskip("triton")
    from megat2i.kernels.linear_cross_entropy import triton_head

    assert system.CHUNK_ROWS == triton_head.CHUNK_ROWS
