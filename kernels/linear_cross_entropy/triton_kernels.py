"""The head's Triton kernels: exponentials of logits from a matrix product's epilogue, and products that skip row tiles.

Shapes: n rows (tokens of a chunk), c columns (of one piece of the vocabulary), D hidden width. bfloat16 operands or
float32 ones (then multiplied without TF32), float32 sums. Every number has one writer, so results are deterministic.
Offsets are 32-bit integers: no operand may have 2^31 elements or more.
"""

import torch
import triton
import triton.language as tl

DEAD = tl.constexpr(
    -2
)  # in place of a target's column: the row takes no part in this piece; -1: its target is elsewhere
# Tiles by chip (least compute capability) and operand width in bytes. What is listed is what is tested ahead of time:
# no entry spills registers or needs more shared memory than the chip has.
LOGITS_TILES = {
    (80, 2): {"ROWS": 128, "COLUMNS": 256, "DEPTH": 32, "num_warps": 8, "num_stages": 4},
    (90, 2): {"ROWS": 128, "COLUMNS": 256, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
    (80, 4): {"ROWS": 128, "COLUMNS": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 2},
}
HIDDEN_TILES = {
    (80, 2): {"ROWS": 128, "WIDTH": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 4},
    (90, 2): {"ROWS": 128, "WIDTH": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
    (80, 4): {"ROWS": 128, "WIDTH": 64, "DEPTH": 16, "num_warps": 8, "num_stages": 2},
}
WEIGHT_TILES = {
    (80, 2): {"COLUMNS": 128, "WIDTH": 128, "ROWS": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 4},
    (90, 2): {"COLUMNS": 128, "WIDTH": 128, "ROWS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
    (80, 4): {"COLUMNS": 128, "WIDTH": 64, "ROWS": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 2},
}


def tiles_for(table: dict, tensor: torch.Tensor) -> dict:
    """The entry of ``table`` for the chip and the dtype of ``tensor``; interpreted: the oldest chip."""
    chip = 80
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9:
        chip = 90
    width = tensor.element_size()
    return table.get((chip, width)) or table[80, width]


@triton.jit
def row_logits(x, w, local_row, out, width, stride_x, stride_w, BLOCK: tl.constexpr):
    """out[i] = x[i] . w[local_row[i]] in float32; one program a row."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(local_row + i)
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        a = tl.load(x + i * stride_x + start + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(w + row * stride_w + start + at, mask=inside, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + i, tl.sum(total, axis=0))


@triton.jit
def tile_of(number, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles at a time, so that both operands stay in the L2 cache."""
    group = number // (GROUP * column_tiles)
    first = group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = number % (GROUP * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def exponentials(
    x, w, e, offset, target, sums, largest, again,
    rows, columns, width, stride_x, stride_w, stride_e,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STORE: tl.constexpr, REDO: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """e = exp(x @ w.T - offset) without the target's column, and of every row its sum and largest exponent by tile.

    x [n, D], w [c, D], e [n, c] in the dtype of x; offset [n] float32; target [n] int32 column, -1 or DEAD; sums and
    largest [column tiles, n] float32; again [row tiles] int32: with REDO the other row tiles are left as they are.
    """
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP)
    if REDO:  # noqa: SIM102 (known when compiled, the inner one is not)
        if tl.load(again + row_tile) == 0:
            return
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    if tl.max((tl.load(target + row, mask=row < rows, other=DEAD) != DEAD).to(tl.int32), axis=0) == 0:
        # a tile of nothing costs nothing
        tl.store(sums + column_tile * rows + row, tl.zeros((ROWS,), tl.float32), mask=row < rows)
        nothing = tl.full((ROWS,), float("-inf"), tl.float32)
        tl.store(largest + column_tile * rows + row, nothing, mask=row < rows)
        if STORE:
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            zeros = tl.zeros((ROWS, COLUMNS), e.dtype.element_ty)
            tl.store(e + row[:, None] * stride_e + column[None, :], zeros, mask=inside)
        return
    # Rows and columns beyond the end read the first ones again: no mask in the loop over rows and columns.
    depth = tl.arange(0, DEPTH)
    x_at = tl.where(row < rows, row, 0)[:, None] * stride_x + depth[None, :]
    w_at = tl.where(column < columns, column, 0)[None, :] * stride_w + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        left = width - start
        a = tl.load(x + start + x_at, mask=depth[None, :] < left, other=0.0)
        b = tl.load(w + start + w_at, mask=depth[:, None] < left, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    shift = tl.load(offset + row, mask=row < rows, other=0.0)
    own = tl.load(target + row, mask=row < rows, other=DEAD)
    last = tl.where(own == DEAD, 0, columns)  # of a dead row no column counts
    other = (column[None, :] < last[:, None]) & (column[None, :] != own[:, None])
    exponent = tl.where(other, total - shift[:, None], float("-inf"))
    tl.store(largest + column_tile * rows + row, tl.max(exponent, axis=1), mask=row < rows)
    power = tl.exp2(exponent * 1.4426950408889634)
    tl.store(sums + column_tile * rows + row, tl.sum(power, axis=1), mask=row < rows)
    if STORE:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(e + row[:, None] * stride_e + column[None, :], power.to(e.dtype.element_ty), mask=inside)


@triton.jit
def combine(sums, largest, offset, log_sum, top, rows, first, last, BLOCK: tl.constexpr):
    """Over column tiles first .. last: log_sum[i] = offset + log(sum of sums), top[i] = offset + largest."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    total = tl.zeros((BLOCK,), tl.float32)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for tile in range(first, last):
        at = tile * rows + row
        total += tl.load(sums + at, mask=inside, other=0.0)
        highest = tl.maximum(highest, tl.load(largest + at, mask=inside, other=float("-inf")))
    shift = tl.load(offset + row, mask=inside, other=0.0)
    tl.store(log_sum + row, shift + tl.log(total), mask=inside)
    tl.store(top + row, shift + highest, mask=inside)


@triton.jit
def hidden_product(
    e, w, keep, total, rows, columns, width, stride_e, stride_w,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """total [n, D] float32 += e @ w in the row tiles where ``keep`` [row tiles] int32 is set."""
    row_tile = tl.program_id(1)
    if tl.load(keep + row_tile) == 0:
        return
    row = row_tile * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, DEPTH)
    e_at = tl.where(row < rows, row, 0)[:, None] * stride_e + depth[None, :]
    w_at = depth[:, None] * stride_w + tl.where(at < width, at, 0)[None, :]
    out = total + row[:, None] * width + at[None, :]
    inside = (row < rows)[:, None] & (at < width)[None, :]
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, columns, DEPTH):
        left = columns - start
        a = tl.load(e + start + e_at, mask=depth[None, :] < left, other=0.0)
        b = tl.load(w + start * stride_w + w_at, mask=depth[:, None] < left, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(out, acc + tl.load(out, mask=inside, other=0.0), mask=inside)


@triton.jit
def weight_product(
    e, x, kept, count, total, rows, columns, width, stride_e, stride_x,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """total [c, D] float32 += e.T @ x over the row tiles kept[0 .. count[0]] (ROWS rows each, int64 and int64 [1])."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, DEPTH)
    e_at = depth[:, None] * stride_e + tl.where(column < columns, column, 0)[None, :]
    x_at = depth[:, None] * stride_x + tl.where(at < width, at, 0)[None, :]
    steps = tl.load(count).to(tl.int32) * (ROWS // DEPTH)
    out = total + column[:, None] * width + at[None, :]
    inside = (column < columns)[:, None] & (at < width)[None, :]
    acc = tl.zeros((COLUMNS, WIDTH), tl.float32)
    for step in range(0, steps):
        first = tl.load(kept + step // (ROWS // DEPTH)).to(tl.int32) * ROWS + (step % (ROWS // DEPTH)) * DEPTH
        a = tl.load(e + first * stride_e + e_at, mask=depth[:, None] < rows - first, other=0.0)
        b = tl.load(x + first * stride_x + x_at, mask=depth[:, None] < rows - first, other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    tl.store(out, acc + tl.load(out, mask=inside, other=0.0), mask=inside)
