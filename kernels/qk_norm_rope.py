"""Optional norm of queries and keys, split into heads and rotary positions in one pass over each (Triton).

Unfused that is a pass for the norm, one for the layout and two for the rotation; here 1 read and 1 write forward, and 2
reads and 1 write backward, where everything is made again from the projection's output.
"""

import torch
from torch import Tensor

from megat2i.kernels.programs import program_count
from megat2i.kernels.registration import custom_op


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    heads: int,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-5,
    centred: bool = True,
    kv_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, S, W] ready for attention, from the projection's q and k [B, S, H * W].

    cosine and sine [S, W/2] or [B, 1, S, W/2] float32, None: no rotation; see ``reference.rotary`` for the layout.
    Weights of [H * W] normalise the whole vector (open_lm), of [W] each head (Qwen 3); None: no norm. ``centred``:
    LayerNorm, else RMSNorm. ``kv_heads``: heads of k where they are fewer. The result is a view of [B, S, H, W] memory.
    """
    return tuple(
        norm_rope_op(x, weight, bias, cosine, sine, count, eps, centred).transpose(1, 2)
        for x, weight, bias, count in ((q, q_weight, q_bias, heads), (k, k_weight, k_bias, kv_heads or heads))
    )


@custom_op("norm_rope")
def norm_rope_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
    heads: int,
    eps: float,
    centred: bool,
) -> Tensor:
    """[B, S, H, W] from x [B, S, H * W]."""
    from megat2i.kernels import qk_norm_rope_kernels as kernels  # needs Triton, which CPUs do without

    batch, length, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    half = _half(width, heads, weight)
    out = torch.empty((batch, length, heads, 2 * half), dtype=x.dtype, device=x.device)
    tables = _tables(cosine, sine, x)
    if out.numel():
        kernels.norm_rope_forward[(batch * length,)](
            x, x if weight is None else weight, x if bias is None else bias, *tables[:2], out, length, heads, half,
            x.stride(0), x.stride(1), tables[2], eps, ROTARY=cosine is not None,
            **_constants(heads, half, weight, bias, centred),
        )  # fmt: skip
    return out


@torch.library.register_fake("megat2i::norm_rope")
def _(x, weight, bias, cosine, sine, heads, eps, centred):
    return x.new_empty((x.shape[0], x.shape[1], heads, x.shape[2] // heads))


@custom_op("norm_rope_backward")
def norm_rope_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    cosine: Tensor | None,
    sine: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those that do not exist are empty."""
    from megat2i.kernels import qk_norm_rope_kernels as kernels

    batch, length, width = x.shape
    heads = grad.shape[2]
    x, grad = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, grad))
    half = _half(width, heads, weight)
    result = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    programs = program_count(batch * length, x.device)
    constants = _constants(heads, half, weight, x if has_bias else None, centred)
    sizes = (programs, 2, constants["HEADS"], constants["HALF"])
    of_weight = torch.zeros(sizes if weight is not None else 0, dtype=torch.float32, device=x.device)
    of_bias = torch.zeros(sizes if has_bias else 0, dtype=torch.float32, device=x.device)
    tables = _tables(cosine, sine, x)
    if result.numel():
        kernels.norm_rope_backward[(programs,)](
            grad, x, x if weight is None else weight, *tables[:2], result, of_weight, of_bias, batch * length, length,
            heads, half, *grad.stride()[:3], x.stride(0), x.stride(1), tables[2], eps, ROTARY=cosine is not None,
            **constants,
        )  # fmt: skip
    sums = [_gain_gradient(parts, heads, half, weight) for parts in (of_weight, of_bias)]
    return result, *sums


@torch.library.register_fake("megat2i::norm_rope_backward")
def _(grad, x, weight, has_bias, cosine, sine, eps, centred):
    gain = x.new_empty(0) if weight is None else torch.empty_like(weight)
    return x.new_empty(x.shape), gain, torch.empty_like(gain) if has_bias else x.new_empty(0)


def _gain_gradient(parts: Tensor, heads: int, half: int, weight: Tensor | None) -> Tensor:
    """From the sums of every program, [programs, 2, HEADS, HALF], the gradient of a weight or bias."""
    if weight is None or parts.dim() == 1:
        return parts.new_empty(0, dtype=parts.dtype if weight is None else weight.dtype)
    total = parts.sum(dim=0)[:, :heads, :half].transpose(0, 1).reshape(heads, 2 * half)
    return (total.sum(dim=0) if len(weight) == 2 * half else total.flatten()).to(weight.dtype)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, cosine, sine, _, ctx.eps, ctx.centred = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, cosine, sine)


def _backward(ctx, grad):
    x, weight, cosine, sine = ctx.saved_tensors
    of_x, of_weight, of_bias = norm_rope_backward_op(grad, x, weight, ctx.has_bias, cosine, sine, ctx.eps, ctx.centred)
    of_weight, of_bias = None if weight is None else of_weight, of_bias if ctx.has_bias else None
    return of_x, of_weight, of_bias, None, None, None, None, None


torch.library.register_autograd("megat2i::norm_rope", _backward, setup_context=_setup)


def _half(width: int, heads: int, weight: Tensor | None) -> int:
    if width % (2 * heads):
        raise ValueError(f"{width} columns do not divide into {heads} heads of even width")
    if weight is not None and len(weight) not in (width, width // heads):
        raise ValueError(f"a weight of {len(weight)} is neither for the whole vector ({width}) nor for one head")
    return width // heads // 2


def _constants(heads: int, half: int, weight: Tensor | None, bias: Tensor | None, centred: bool) -> dict:
    from megat2i.kernels import qk_norm_rope_kernels as kernels

    block_heads, block_half = (1 << (n - 1).bit_length() for n in (heads, half))
    norm = kernels.NO_NORM if weight is None else kernels.PER_HEAD if len(weight) == 2 * half else kernels.WHOLE
    return {
        "HEADS": block_heads,
        "HALF": block_half,
        "NORM": norm.value if heads > 1 or weight is None else kernels.WHOLE.value,
        "CENTRED": centred,
        "HAS_BIAS": bias is not None,
        "num_warps": kernels.warps_for(block_heads, block_half),
    }


def _tables(cosine: Tensor | None, sine: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """(cosine, sine, elements between batch rows: 0 where all share them)."""
    if cosine is None:
        return x, x, 0
    cosine, sine = cosine.float().contiguous(), sine.float().contiguous()
    return cosine, sine, cosine.shape[-2] * cosine.shape[-1] if cosine.dim() == 4 else 0
