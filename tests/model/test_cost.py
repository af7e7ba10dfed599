"""The model's cost: parameters of the real GPT, FLOPs counted by PyTorch itself."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megat2i.config import ModelConfig
from megat2i.kernels import choose_ops, reference
from megat2i.model import cost
from megat2i.model.gpt import GPT

SHAPE = ModelConfig(hidden=32, layers=3, heads=4, ffn=48)
ROWS, RANGES = 40, ((0, 20), (24, 40))
COLUMNS = 36
OPS = choose_ops(torch.device("cpu"), torch.float32)


def gpt(shape: ModelConfig, device: str = "meta") -> GPT:
    with torch.device(device):
        return GPT(shape, ROWS, RANGES, OPS)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


VARIANTS = [
    {"kv_heads": 2},
    {"head_width": 12},
    {"kv_heads": 1, "head_width": 6, "qk_norm": True},
    {"kv_heads": 2, "qk_norm": True, "qk_norm_per_head": True, "norm": "rms_norm"},
    {"feed_forward": "gelu"},
    {"feed_forward": "gelu", "ffn": None},
    {"embedding_norm": True},
    {"tied_embeddings": True},
]


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"norm": norm, "qk_norm": qk_norm, "ffn": ffn}
            for norm in ("layer_norm", "layer_norm_gain_only", "layer_norm_no_gain", "rms_norm")
            for qk_norm in (False, True)
            for ffn in (48, None)
        ),
        *VARIANTS,
    ],
    ids=str,
)
def test_parameters_are_those_of_the_model(changes):
    shape = replace(SHAPE, **changes)
    model = gpt(shape)
    assert cost.model_parameters(shape, ROWS) == count(model)
    assert cost.layer_parameters(shape) == count(model.layers["1"])
    assert cost.layer_matrices(shape) == sum(p.numel() for p in model.layers["1"].parameters() if p.dim() == 2)
    behind = count(model.post_embed_norm) if shape.embedding_norm else 0
    assert cost.embedding_parameters(shape, ROWS) == count(model.tok_embeddings) + behind
    output = 0 if shape.tied_embeddings else count(model.output)
    assert cost.head_parameters(shape, ROWS) == count(model.norm) + output


def test_another_model_has_other_parameters():
    """Negative control: every field that the count depends on changes it as it changes the model."""
    changes = [{"norm": "rms_norm"}, {"qk_norm": True}, {"layers": 4}, {"hidden": 64}, {"ffn": 64}, *VARIANTS]
    for change in changes:
        other = replace(SHAPE, **change)
        assert cost.model_parameters(SHAPE, ROWS) != count(gpt(other)) == cost.model_parameters(other, ROWS)


def test_parameters_of_open_lm_1b():
    shape = ModelConfig()
    assert cost.model_parameters(shape, 50_432) == 1_439_895_552  # counted on open_lm's own model
    assert cost.model_parameters(shape, 66_816) - cost.model_parameters(shape, 50_432) == 2 * 16_384 * 2048


def test_flops_are_those_of_the_convention():
    layer = 32 * (3 * 32) + 32 * 32 + 32 * (2 * 48) + 48 * 32
    attention = 2 * 2 * 10 * 32 / 2  # scores and values, 2 FLOPs each, over half of S = 10 keys
    assert cost.layer_forward_flops(SHAPE, 10) == 2 * layer + attention
    assert cost.head_forward_flops(SHAPE, COLUMNS) == 2 * 32 * COLUMNS
    assert cost.flops_per_token(SHAPE, COLUMNS, 10) == 3 * (3 * (2 * layer + attention) + 2 * 32 * COLUMNS)


@pytest.mark.parametrize("changes", [{}, *VARIANTS], ids=str)
def test_flops_are_those_that_pytorch_counts(changes):
    """Forward and backward of the real blocks and of the logits; PyTorch counts all keys, not the causal half."""
    batch, length, shape = 2, 10, replace(SHAPE, **changes)
    # the plain attention: PyTorch's counter does not know the fused one of CPUs
    model = GPT(shape, ROWS, RANGES, replace(OPS, attention=reference.attention))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.zeros(batch, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.logits(tokens).sum().backward()
    other_half = shape.layers * cost.attention_forward_flops(shape, length)
    per_token = cost.flops_per_token(shape, ROWS, length) + 3 * other_half  # logits computes all rows
    assert counter.get_total_flops() == per_token * batch * length
