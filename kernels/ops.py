"""``Ops``: the plain callables that the model's layers receive, chosen once for a device; this is the one place."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from megat2i.kernels import norm, reference
from megat2i.kernels.attention import choose_attention
from megat2i.kernels.decode_attention import decode_attention
from megat2i.kernels.interpreter import interpreting
from megat2i.kernels.linear_cross_entropy import default_implementation, linear_cross_entropy
from megat2i.kernels.optimizer import choose_adamw
from megat2i.kernels.qk_norm_rope import norm_rope_op, qk_norm_rope
from megat2i.kernels.swiglu import swiglu

IMPLEMENTATIONS = ("reference", "chunked", "triton")


@dataclass(frozen=True)
class Ops:
    """Implementations of the model's operations; signatures are those of ``reference``."""

    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    attention: Callable[..., Tensor]
    decode_attention: Callable[..., Tensor] | None  # None: ``attention`` with a mask over all of the cache
    linear_cross_entropy: Callable[..., object]
    description: str  # one line for the log: which implementation each op has


def choose_ops(device: torch.device, dtype: torch.dtype, implementation: str | None = None) -> Ops:
    """The default for a device and dtype, or ``implementation`` for every op.

    "reference": the plain twins; "chunked": PyTorch's own operations, and the loss head in chunks; "triton": our Triton
    kernels (float64 has none). Attention is a library's in all but "reference".
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation '{implementation}' is not one of {', '.join(IMPLEMENTATIONS)}")
    head = implementation or default_implementation(device, dtype)
    block = implementation or default_block(device, dtype)[0]
    attention = choose_attention(device, dtype)
    if block == "reference":
        attention = attention._replace(function=reference.attention, name="reference")
    return Ops(
        **_block_ops(block),
        attention=attention.function,
        linear_cross_entropy=partial(linear_cross_entropy, implementation=implementation),
        description=f"attention={attention.name} block={block} head={head}",
    )


def default_block(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(implementation of the norms, rotary positions and SwiGLU, why)."""
    if dtype == torch.float64:
        return "chunked", "the Triton kernels compute in float32"
    if device.type == "cuda":
        return "triton", "a GPU"
    if interpreting():
        return "triton", "TRITON_INTERPRET=1: interpreted"
    return "chunked", "a CPU: PyTorch's own operations"


def describe(device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """Which implementation each op will use on ``device`` (default: the GPU if there is one) in ``dtype``, and why."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head, (block, why) = default_implementation(device, dtype), default_block(device, dtype)
    because = {
        "triton": "Triton interpreted" if interpreting() else "bfloat16 on a GPU",
        "chunked": "PyTorch in chunks of tokens: " + ("a CPU" if device.type == "cpu" else f"{dtype} gains nothing"),
    }[head]
    attention, adamw = choose_attention(device, dtype), choose_adamw(device)
    lines = [("linear_cross_entropy", head, because)]
    lines += [(name, block, why) for name in ("norms", "qk_norm_rope", "rotary", "swiglu")]
    lines += [("decode_attention", block if block == "triton" else "attention, masked", why)]
    lines += [("attention", attention.name, attention.reason), ("AdamW", adamw.name, adamw.reason)]
    head_line = f"{device}, {dtype}" + (f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "")
    return "\n".join([head_line, *(f"  {name:22}{chosen:26}{reason}" for name, chosen, reason in lines)])


def _block_ops(implementation: str) -> dict[str, Callable]:
    names = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "rotary", "qk_norm_rope", "swiglu")
    ops = {name: getattr(reference, name) for name in (*names, "decode_attention")}
    if implementation == "triton":
        ops |= {name: getattr(norm, name) for name in names[:4]}
        ops |= {"rotary": _rotary, "qk_norm_rope": qk_norm_rope, "swiglu": swiglu, "decode_attention": decode_attention}
    elif implementation == "chunked":
        ops |= {"layer_norm": _layer_norm, "rms_norm": _rms_norm}
        ops |= {"add_layer_norm": _add_layer_norm, "add_rms_norm": _add_rms_norm, "qk_norm_rope": _qk_norm_rope}
        ops["decode_attention"] = None
    return ops


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float):
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float):
    total = x + residual
    return _rms_norm(total, weight, eps), total


def _qk_norm_rope(
    q: Tensor, k: Tensor, cosine: Tensor | None, sine: Tensor | None, heads: int, *,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    q_bias: Tensor | None = None, k_bias: Tensor | None = None, eps: float = 1e-5, centred: bool = True,
    kv_heads: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    results = []
    for x, weight, bias, count in ((q, q_weight, q_bias, heads), (k, k_weight, k_bias, kv_heads or heads)):
        if weight is not None:
            parts = x.unflatten(-1, (-1, len(weight)))
            x = (_layer_norm(parts, weight, bias, eps) if centred else _rms_norm(parts, weight, eps)).flatten(-2)
        x = x.unflatten(-1, (count, -1)).transpose(1, 2)
        results.append(x if cosine is None else reference.rotary(x, cosine, sine))
    return tuple(results)


def _rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Of x [B, H, S, W], best a transposed view of [B, S, H, W] memory, as a projection leaves it."""
    tokens = x.transpose(1, 2)
    return norm_rope_op(tokens.flatten(2), None, None, cosine, sine, x.shape[1], 0.0, False).transpose(1, 2)
