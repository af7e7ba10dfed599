"""Triton kernel of attention for one query a row: one program for each row and query head, softmax as it goes."""

import triton
import triton.language as tl

BLOCK, WARPS = 64, 4  # keys at a time: 16 KB of keys and 16 KB of values in flight for each program at width 128


@triton.jit
def decode_attention(
    q, keys, values, first, position, out, heads, group, length, width, stride_row, stride_head, scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out [B, H, W] = softmax(q . keys * scale) values over the positions first[row] .. position[0].

    q [B, H, W] with strides; keys and values [B, H / group, length, W] contiguous; first and position int64.
    """
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    last = tl.load(position).to(tl.int32)
    start = tl.minimum(tl.load(first + row).to(tl.int32), last)
    at = tl.arange(0, WIDTH)
    query = tl.load(q + row * stride_row + head * stride_head + at, mask=at < width, other=0.0).to(tl.float32)
    query *= scale * 1.4426950408889634  # exp2 below
    base = (row * (heads // group) + head // group).to(tl.int64) * length * width
    largest = float("-inf")
    total = 0.0
    result = tl.zeros((WIDTH,), tl.float32)
    for begin in range(start, last + 1, BLOCK):
        key = begin + tl.arange(0, BLOCK)
        where = base + key[:, None] * width + at[None, :]
        seen = (key <= last)[:, None] & (at < width)[None, :]
        k = tl.load(keys + where, mask=seen, other=0.0).to(tl.float32)
        v = tl.load(values + where, mask=seen, other=0.0).to(tl.float32)
        score = tl.where(key <= last, tl.sum(query[None, :] * k, axis=1), float("-inf"))
        highest = tl.maximum(largest, tl.max(score, axis=0))
        share = tl.exp2(score - highest)
        before = tl.exp2(largest - highest)
        total = total * before + tl.sum(share, axis=0)
        result = result * before + tl.sum(share[:, None] * v, axis=0)
        largest = highest
    tl.store(out + tl.program_id(0) * width + at, (result / total).to(out.dtype.element_ty), mask=at < width)
