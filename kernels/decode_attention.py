"""Attention of one new token a row over the keys and values of those before it (Triton): sampling's own attention.

It reads what a row has written and nothing else: two numbers on the device say where that begins and ends, so that the
shapes are the same for every token and a CUDA graph can hold the call. Masked attention reads all of the cache, twice
as much on average. The floor is bytes: 2 B K W of a number's bytes for every position, once.
"""

import torch
from torch import Tensor


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, position: Tensor) -> Tensor:
    """[B, H, 1, W] from q [B, H, 1, W] and a contiguous cache [B, K, L, W]; see ``reference.decode_attention``.

    Of one floating dtype, float32 inside; ``first`` [B] and ``position`` [1] int64. Without gradients.
    """
    from megat2i.kernels import decode_attention_kernels as kernels  # needs Triton, which CPUs do without

    batch, heads, _, width = q.shape
    if not (keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape):
        raise ValueError("keys and values must be contiguous and of one shape [B, K, L, W]")
    q = q if q.stride(3) == 1 else q.contiguous()
    out = torch.empty((batch, 1, heads, width), dtype=q.dtype, device=q.device)
    kernels.decode_attention[(batch * heads,)](
        q, keys, values, first, position, out, heads, heads // keys.shape[1], keys.shape[2], width, q.stride(0),
        q.stride(1), width**-0.5, BLOCK=kernels.BLOCK, WIDTH=1 << (width - 1).bit_length(), num_warps=kernels.WARPS,
    )  # fmt: skip
    return out.transpose(1, 2)
