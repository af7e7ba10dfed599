"""Triton kernels of LayerNorm and RMSNorm, with an optional residual added first. n rows of width D."""

import triton
import triton.language as tl


def warps_for(block: int) -> int:
    """Warps of a program that holds a row of ``block`` elements: 16 bytes of bfloat16 a thread."""
    return min(16, max(1, block // 256))


@triton.jit
def normalised(x, inside, width, eps, CENTRED: tl.constexpr):
    """(x centred and divided by its deviation, 1 / deviation) of one row in float32."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    return x * scale, scale


@triton.jit
def norm_forward(
    x, residual, weight, bias, out, total, width, stride_x, stride_residual, eps,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out [n, D] = norm(x [+ residual]) * weight [+ bias]; total [n, D] = x + residual. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * stride_residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * width + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    normed, _ = normalised(values, inside, width, eps, CENTRED)
    normed *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normed += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    grad_out, grad_total, x, weight, grad_x, grad_weight, grad_bias, rows, width, stride_grad, stride_x, eps,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    """grad_x [n, D], and this program's part of the sums over rows, grad_weight and grad_bias [programs, D] float32.

    Statistics are made again from x, which is read anyway. grad_total [n, D]: a gradient of x from elsewhere.
    """
    first = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for number in range(first, rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        values = tl.load(x + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_out + row * stride_grad + at, mask=inside, other=0.0).to(tl.float32)
        normed, scale = normalised(values, inside, width, eps, CENTRED)
        of_weight += grad * normed
        if HAS_BIAS:
            of_bias += grad
        grad *= gain
        along = tl.sum(grad * normed, axis=0) / width
        result = grad - normed * along
        if CENTRED:
            result -= tl.sum(grad, axis=0) / width
        result *= scale
        if HAS_TOTAL:
            result += tl.load(grad_total + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * width + at, result.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + first * width + at, of_weight, mask=inside)
    if HAS_BIAS:
        tl.store(grad_bias + first * width + at, of_bias, mask=inside)
