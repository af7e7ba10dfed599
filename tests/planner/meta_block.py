"""The model's layers with a GPU's operations on PyTorch's meta device, which knows shapes alone: no GPU is needed."""

from dataclasses import replace

import torch
from torch import Tensor

from megat2i.config import ModelConfig
from megat2i.kernels import choose_ops
from megat2i.model.gpt import GPT
from megat2i.model.part import Part
from megat2i.model.partition import StageLayers

BATCH, LENGTH = 8, 128
TOKENS = BATCH * LENGTH
SHAPE = ModelConfig(hidden=128, heads=4, ffn=320, layers=1)
CHANGES = (
    {}, {"norm": "rms_norm"}, {"qk_norm": True}, {"positions": "rotary"}, {"positions": "rotary", "qk_norm": True},
    {"positions": "rotary_interleaved"}, {"kv_heads": 2}, {"head_width": 48}, {"feed_forward": "gelu"},
    {"positions": "rotary_interleaved", "qk_norm": True, "qk_norm_per_head": True},
)  # fmt: skip


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


def block_model(shape: ModelConfig, recompute: str = "none", apart: bool = False) -> GPT:
    """Layers without a head; ``apart``: queries and keys normed as on one of several tensor-parallel ranks."""
    ops = replace(choose_ops(torch.device("cpu"), torch.bfloat16, "triton"), attention=_flash_attention)
    stage = StageLayers(0, shape.layers, embedding=True, head=False)
    with torch.device("meta"):
        model = GPT(shape, 256, ((0, 256),), ops, part=Part(stages=(stage,), recompute=recompute)).bfloat16()
    for layer in model.layers.values():
        if apart:
            layer.attention.q_norm.by_op = False
    return model


def forward(model: GPT) -> Tensor:
    """What leaves the last layer for BATCH rows of LENGTH tokens."""
    (stage,) = model.stages
    return model.run_stage(stage, torch.zeros(BATCH, LENGTH, dtype=torch.long, device=model.device), None)


def saved_bytes(model: GPT) -> int:
    """Bytes that autograd keeps after a forward pass, the weights excepted."""
    kept, alive = {}, []  # these so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if not forward(model).requires_grad:
            raise AssertionError("nothing is differentiated")
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(size for storage, size in kept.items() if storage not in weights)
