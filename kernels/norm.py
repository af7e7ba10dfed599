"""LayerNorm and RMSNorm over the last dimension, optionally of a sum: one pass forward, one backward (Triton).

Bytes a token of width D in bfloat16: forward 2 passes (x, result; 4 with a residual), backward 3 (x, gradient, result);
the statistics are recomputed, so nothing but the input is kept. The gradients of gain and bias are summed in float32 by
a fixed number of programs, hence deterministic.
"""

import torch
from torch import Tensor

from megat2i.kernels.programs import program_count
from megat2i.kernels.registration import custom_op


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x [..., D] with gain weight [D] and optional bias [D]; float32 inside, result in the dtype of x."""
    return norm_op(x, None, weight, bias, eps, True)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., D] with gain weight [D] (Zhang and Sennrich 2019)."""
    return norm_op(x, None, weight, None, eps, False)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of x + residual, x + residual), both [..., D] in the dtype of x, in one pass."""
    return norm_op(x, residual, weight, bias, eps, True)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual), both [..., D] in the dtype of x, in one pass."""
    return norm_op(x, residual, weight, None, eps, False)


@custom_op("norm")
def norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """(result, x + residual); the second is empty without a residual."""
    from megat2i.kernels import norm_kernels as kernels  # needs Triton, which CPUs do without

    rows = x.reshape(-1, x.shape[-1])
    width, block = rows.shape[1], _block(rows.shape[1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    added = rows if residual is None else residual.reshape(rows.shape)
    total = rows.new_empty(0) if residual is None else torch.empty_like(out)
    rows, added = _unit_stride(rows), _unit_stride(added)
    if len(rows):
        kernels.norm_forward[(len(rows),)](
            rows, added, weight, weight if bias is None else bias, out, total, width, rows.stride(0), added.stride(0),
            eps, BLOCK=block, CENTRED=centred, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            num_warps=kernels.warps_for(block),
        )  # fmt: skip
    return out.view(x.shape), total if residual is None else total.view(x.shape)


@torch.library.register_fake("megat2i::norm")
def _(x, residual, weight, bias, eps, centred):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty(0) if residual is None else torch.empty_like(out)


@custom_op("norm_backward")
def norm_backward_op(
    grad_out: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, has_bias: bool, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (the sum, where a residual was added), weight and bias (empty without one)."""
    from megat2i.kernels import norm_kernels as kernels

    rows, grad = (_unit_stride(t.reshape(-1, t.shape[-1])) for t in (x, grad_out))
    width, block = rows.shape[1], _block(rows.shape[1])
    other = grad if grad_total is None else grad_total.reshape(rows.shape).contiguous()
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    programs = program_count(len(rows), x.device)
    of_weight = torch.zeros((programs, width), dtype=torch.float32, device=x.device)
    of_bias = torch.zeros((programs if has_bias else 0, width), dtype=torch.float32, device=x.device)
    if len(rows):
        kernels.norm_backward[(programs,)](
            grad, other, rows, weight, result, of_weight, of_bias, len(rows), width, grad.stride(0), rows.stride(0),
            eps, BLOCK=block, CENTRED=centred, HAS_BIAS=has_bias, HAS_TOTAL=grad_total is not None,
            num_warps=kernels.warps_for(block),
        )  # fmt: skip
    grad_bias = of_bias.sum(dim=0).to(weight.dtype) if has_bias else weight.new_empty(0)
    return result.view(x.shape), of_weight.sum(dim=0).to(weight.dtype), grad_bias


@torch.library.register_fake("megat2i::norm_backward")
def _(grad_out, grad_total, x, weight, has_bias, eps, centred):
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    return result, torch.empty_like(weight), weight.new_empty(weight.shape[0] if has_bias else 0)


def _setup(ctx, inputs, output) -> None:
    x, residual, weight, bias, ctx.eps, ctx.centred = inputs
    ctx.set_materialize_grads(False)
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight)
    if not ctx.has_residual:
        ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, grad_total):
    x, weight = ctx.saved_tensors
    if grad_out is None:  # the sum alone was used
        return grad_total, grad_total if ctx.has_residual else None, None, None, None, None
    grad_x, grad_weight, grad_bias = norm_backward_op(
        grad_out, grad_total, x, weight, ctx.has_bias, ctx.eps, ctx.centred
    )
    residual = grad_x if ctx.has_residual else None
    return grad_x, residual, grad_weight, grad_bias if ctx.has_bias else None, None, None


torch.library.register_autograd("megat2i::norm", _backward, setup_context=_setup)


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _block(width: int) -> int:
    """The power of two that holds a row."""
    if width > 1 << 14:
        raise ValueError(f"the Triton norm holds rows of at most 16,384, not {width}; use the PyTorch implementation")
    return 1 << (width - 1).bit_length()
