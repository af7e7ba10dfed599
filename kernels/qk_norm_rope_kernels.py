"""Triton kernels of the norm and rotary positions of queries or keys: a program holds the H heads of a token.

A head of width W is held as its two halves, [H, W/2] each, which rotary positions turn against each other.
"""

import triton
import triton.language as tl

NO_NORM, WHOLE, PER_HEAD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def warps_for(heads: int, half: int) -> int:
    """Warps of a program of two tiles of ``heads`` x ``half`` elements."""
    return min(16, max(1, heads * half // 128))


@triton.jit
def mean_of(first, second, count, NORM: tl.constexpr):
    """Mean over both halves: of everything [1, 1], or of each head [H, 1]."""
    total = tl.sum(first + second, axis=1)
    if NORM == WHOLE:
        total = tl.zeros_like(total) + tl.sum(total, axis=0)
    return total[:, None] / count


@triton.jit
def normalised(first, second, inside, count, eps, NORM: tl.constexpr, CENTRED: tl.constexpr):
    """(both halves normalised, 1 / deviation [H, 1])."""
    if CENTRED:
        mean = mean_of(first, second, count, NORM)
        first = tl.where(inside, first - mean, 0.0)
        second = tl.where(inside, second - mean, 0.0)
    scale = 1.0 / tl.sqrt(mean_of(first * first, second * second, count, NORM) + eps)
    return first * scale, second * scale, scale


@triton.jit
def norm_rope_forward(
    x, weight, bias, cosine, sine, out, length, heads, half, stride_batch, stride_token, stride_table, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROTARY: tl.constexpr,
):  # fmt: skip
    """out [B, S, H, W] of x [B, S, H * W]; cosine and sine [S, W/2] or [B, S, W/2] float32. One program a token."""
    token = tl.program_id(0)
    batch, position = token // length, token % length
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    row = x + batch.to(tl.int64) * stride_batch + position.to(tl.int64) * stride_token
    where = head * (2 * half) + at
    first = tl.load(row + where, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + where + half, mask=inside, other=0.0).to(tl.float32)
    if NORM != NO_NORM:
        count = 2 * half * heads if NORM == WHOLE else 2 * half
        first, second, _ = normalised(first, second, inside, count, eps, NORM, CENTRED)
        gain_at = where if NORM == WHOLE else at + head * 0
        first *= tl.load(weight + gain_at, mask=inside, other=0.0).to(tl.float32)
        second *= tl.load(weight + gain_at + half, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            first += tl.load(bias + gain_at, mask=inside, other=0.0).to(tl.float32)
            second += tl.load(bias + gain_at + half, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        table = batch.to(tl.int64) * stride_table + position * half + at
        c = tl.load(cosine + table, mask=at < half, other=0.0)
        s = tl.load(sine + table, mask=at < half, other=0.0)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    to = out + token.to(tl.int64) * (2 * half * heads) + where
    tl.store(to, first.to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_rope_backward(
    grad, x, weight, cosine, sine, grad_x, grad_weight, grad_bias, tokens, length, heads, half,
    grad_batch, grad_token, grad_head, stride_batch, stride_token, stride_table, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROTARY: tl.constexpr,
):  # fmt: skip
    """grad_x [B, S, H * W], and this program's sums over tokens [programs, 2, HEADS, HALF] float32, by halves."""
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    where = head * (2 * half) + at
    count = 2 * half * heads if NORM == WHOLE else 2 * half
    gain_at = where if NORM == WHOLE else at + head * 0
    weight_first = tl.zeros((HEADS, HALF), tl.float32)
    weight_second = tl.zeros((HEADS, HALF), tl.float32)
    bias_first = tl.zeros((HEADS, HALF), tl.float32)
    bias_second = tl.zeros((HEADS, HALF), tl.float32)
    for number in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        batch, position = token // length, token % length
        from_grad = grad + batch * grad_batch + position * grad_token + head * grad_head + at
        d_first = tl.load(from_grad, mask=inside, other=0.0).to(tl.float32)
        d_second = tl.load(from_grad + half, mask=inside, other=0.0).to(tl.float32)
        if ROTARY:  # the transposed rotation
            table = batch * stride_table + position * half + at
            c = tl.load(cosine + table, mask=at < half, other=0.0)
            s = tl.load(sine + table, mask=at < half, other=0.0)
            turned = d_first * c + d_second * s
            d_second = d_second * c - d_first * s
            d_first = turned
        if NORM != NO_NORM:
            row = x + batch * stride_batch + position * stride_token
            first = tl.load(row + where, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(row + where + half, mask=inside, other=0.0).to(tl.float32)
            first, second, scale = normalised(first, second, inside, count, eps, NORM, CENTRED)
            weight_first += d_first * first
            weight_second += d_second * second
            if HAS_BIAS:
                bias_first += d_first
                bias_second += d_second
            d_first *= tl.load(weight + gain_at, mask=inside, other=0.0).to(tl.float32)
            d_second *= tl.load(weight + gain_at + half, mask=inside, other=0.0).to(tl.float32)
            along = mean_of(d_first * first, d_second * second, count, NORM)
            level = mean_of(d_first, d_second, count, NORM) if CENTRED else 0.0
            d_first = (d_first - first * along - level) * scale
            d_second = (d_second - second * along - level) * scale
        to = grad_x + token * (2 * half * heads) + where
        tl.store(to, d_first.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(to + half, d_second.to(grad_x.dtype.element_ty), mask=inside)
    if NORM != NO_NORM:
        tile = tl.program_id(0) * (2 * HEADS * HALF) + head * HALF + at
        tl.store(grad_weight + tile, weight_first)
        tl.store(grad_weight + tile + HEADS * HALF, weight_second)
        if HAS_BIAS:
            tl.store(grad_bias + tile, bias_first)
            tl.store(grad_bias + tile + HEADS * HALF, bias_second)
