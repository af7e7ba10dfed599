"""SwiGLU's product, silu(gate) * up, in one pass; the backward pass recomputes it from its inputs (Triton).

Passes over [n, F]: forward 3 (two in, one out), backward 5; PyTorch's own operations make 5 and 11 and keep silu(gate).
"""

import torch
from torch import Tensor

from megat2i.kernels.registration import custom_op


@custom_op("swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) for gate, up [..., F] of one dtype; computed in float32, contiguous result."""
    from megat2i.kernels import swiglu_kernels as kernels  # needs Triton, which CPUs do without

    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be alike")
    gates, ups = _rows(gate), _rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        kernels.swiglu_forward[_grid(gates, kernels.BLOCK)](
            gates, ups, out, gates.shape[1], gates.stride(0), ups.stride(0), BLOCK=kernels.BLOCK,
            num_warps=kernels.WARPS,
        )  # fmt: skip
    return out


@torch.library.register_fake("megat2i::swiglu")
def _(gate, up):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@custom_op("swiglu_backward")
def swiglu_backward_op(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    from megat2i.kernels import swiglu_kernels as kernels

    grads, gates, ups = _rows(grad), _rows(gate), _rows(up)
    of_gate, of_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if grad.numel():
        kernels.swiglu_backward[_grid(gates, kernels.BLOCK)](
            grads, gates, ups, of_gate, of_up, gates.shape[1], grads.stride(0), gates.stride(0), ups.stride(0),
            BLOCK=kernels.BLOCK, num_warps=kernels.WARPS,
        )  # fmt: skip
    return of_gate, of_up


@torch.library.register_fake("megat2i::swiglu_backward")
def _(grad, gate, up):
    return tuple(torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return swiglu_backward_op(grad, *ctx.saved_tensors)


torch.library.register_autograd("megat2i::swiglu", _backward, setup_context=_setup)


def _rows(x: Tensor) -> Tensor:
    """[n, F] with unit stride, a view wherever the strides allow: halves of a packed projection stay where they are."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(rows: Tensor, block: int) -> tuple[int, int]:
    return len(rows), -(-rows.shape[1] // block)
