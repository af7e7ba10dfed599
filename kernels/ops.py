"""``Ops``: the plain callables that the model's layers receive, chosen once for a device."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from megat2i.kernels import reference
from megat2i.kernels.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class Ops:
    """Implementations of the model's operations; signatures are those of ``reference``."""

    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., object]
    description: str  # one line for the log: which implementation each op has


def choose_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """PyTorch's fused operations; attention by flash-attn where it is installed and can run.

    On CPUs, PyTorch's fused attention is slow in bfloat16 (backward at S = 96: five times the two matrix products).
    """
    half = dtype in (torch.float16, torch.bfloat16)
    attention, name = _scaled_dot_product_attention, "torch sdpa"
    if device.type == "cuda" and half and find_spec("flash_attn") is not None:
        attention, name = _flash_attention, "flash-attn"
    elif device.type == "cpu" and half:
        attention, name = _matrix_product_attention, "matrix products"
    return Ops(
        layer_norm=_layer_norm,
        rms_norm=_rms_norm,
        rotary=reference.rotary,
        swiglu=reference.swiglu,
        attention=attention,
        linear_cross_entropy=linear_cross_entropy,
        description=f"attention={name} norm=torch head=chunked",
    )


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _matrix_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        return _scaled_dot_product_attention(q, k, v, mask)
    length = q.shape[-2]
    forbidden = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    rows, keys, values = (x.flatten(0, 1) for x in (q, k, v))  # [B * H, S, W]
    scores = torch.baddbmm(forbidden, rows, keys.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(dim=-1) @ values).view(q.shape)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:  # flash-attn knows no arbitrary masks
        return _scaled_dot_product_attention(q, k, v, mask)
    from flash_attn import flash_attn_func  # an optional dependency, present here

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)
