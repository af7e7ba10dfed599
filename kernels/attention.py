"""Attention is a library's: which one, behind one interface. q, k, v [B, H, S, W] -> [B, H, S, W].

Rows that hold one document, as all of ours, need no mask: causal attention ends where padding begins. Rows packed with
several documents pass ``document_mask``, which PyTorch's attention takes; flash-attn's kernels know no such mask, so a
masked call always is PyTorch's.
"""

from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megat2i.kernels import reference


class Choice(NamedTuple):
    """An implementation and why it was chosen."""

    function: Callable
    name: str
    reason: str


def choose_attention(device: torch.device, dtype: torch.dtype) -> Choice:
    """flash-attn-4 on Hopper and newer, flash-attn, else PyTorch's: cuDNN first on Hopper, products on slow CPUs.

    On CPUs, PyTorch's fused attention is slow in bfloat16 (backward at S = 96: five times the two matrix products).
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda":
        if half:
            return Choice(matrix_product_attention, "matrix products", "faster than PyTorch's sdpa in half precision")
        return Choice(torch_attention, "torch sdpa", "no GPU")
    hopper = torch.cuda.get_device_capability(device)[0] >= 9
    if half and hopper and _installed("flash-attn-4"):
        return Choice(flash_attention_4, "flash-attn-4", "installed; trains on Hopper and newer")
    if half and find_spec("flash_attn_2_cuda") is not None:
        return Choice(flash_attention, "flash-attn", "installed")
    if half and hopper:
        return Choice(cudnn_attention, "torch sdpa, cuDNN first", "Hopper or newer, no flash-attn installed")
    return Choice(torch_attention, "torch sdpa", "no flash-attn installed" if half else "not half precision")


def document_mask(document: Tensor) -> Tensor:
    """Mask [B, 1, S, S] for rows packed with documents, from the number of the document at each position [B, S].

    A query sees earlier positions of its own document.
    """
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention; causal unless ``mask`` (True: may look) is given.

    Masked calls on a GPU are kept from cuDNN, which PyTorch prefers there: with a mask its gradients can be NaN
    (pytorch issue 196678), and some versions of it refuse to be captured in a CUDA graph.
    """
    if mask is None or not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's, which takes cuDNN where it supports the call, then its own flash attention and the others."""
    if mask is not None:
        return torch_attention(q, k, v, mask)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return torch_attention(q, k, v)


def matrix_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Two products and a softmax."""
    if mask is not None:
        return reference.attention(q, k, v, mask)
    length = q.shape[-2]
    forbidden = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    rows, keys, values = (x.flatten(0, 1) for x in (q, k, v))  # [B * H, S, W]
    scores = torch.baddbmm(forbidden, rows, keys.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(dim=-1) @ values).view(q.shape)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """flash-attn 2."""
    if mask is not None:
        return torch_attention(q, k, v, mask)
    from flash_attn import flash_attn_func  # an optional dependency, present here

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """flash-attn 4, whose function returns the log-sum-exp too in some versions."""
    if mask is not None:
        return torch_attention(q, k, v, mask)
    from flash_attn.cute import flash_attn_func  # an optional dependency, present here

    result = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
