"""Triton kernels of SwiGLU: n rows of width F, a block of one row a program."""

import triton
import triton.language as tl

BLOCK = 1024
WARPS = 4


@triton.jit
def swiglu_forward(gate, up, out, width, stride_gate, stride_up, BLOCK: tl.constexpr):
    """out [n, F] = silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * stride_gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + at, mask=inside, other=0.0).to(tl.float32)
    result = g * tl.sigmoid(g) * u
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    grad, gate, up, grad_gate, grad_up, width, stride_grad, stride_gate, stride_up, BLOCK: tl.constexpr
):
    """grad_gate and grad_up [n, F]; the sigmoid is made again."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * stride_gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + row * stride_grad + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    of_gate = d * u * s * (1.0 + g * (1.0 - s))
    tl.store(grad_gate + row * width + at, of_gate.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + row * width + at, (d * g * s).to(grad_up.dtype.element_ty), mask=inside)
