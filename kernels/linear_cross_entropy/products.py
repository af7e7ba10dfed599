"""Matrix products with float32 results, exact for what their operands hold, on CPU and CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within: float32 products on ``device`` are exact for operands that came from ``dtype``.

    For float32 that forbids TF32 and bfloat16 whatever the caller allows elsewhere. On CPUs, bfloat16 operands held in
    float32 may be multiplied by the processor's bfloat16 units: the operands lose nothing, the sums stay float32.
    """
    matmul = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if device.type == "cpu" and dtype == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 for float64) for operands of one dtype; call within ``precision``."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype, float32 or float64; call within ``precision``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
