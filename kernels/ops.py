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
    """PyTorch's fused operations; attention by flash-attn where it is installed and can run."""
    flash = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and find_spec("flash_attn") is not None
    return Ops(
        layer_norm=_layer_norm,
        rms_norm=_rms_norm,
        rotary=reference.rotary,
        swiglu=reference.swiglu,
        attention=_flash_attention if flash else _scaled_dot_product_attention,
        linear_cross_entropy=linear_cross_entropy,
        description=f"attention={'flash-attn' if flash else 'torch sdpa'} norm=torch head=chunked",
    )


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:  # flash-attn knows no arbitrary masks
        return _scaled_dot_product_attention(q, k, v, mask)
    from flash_attn import flash_attn_func  # an optional dependency, present here

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)
