"""wgrad of a linear layer at live blocks, and the gradient probe at the others."""

import triton
import triton.language as tl

from dynaprune_kernels.backends.triton.kernels.packed_index import below, chunk_of_program, is_live, row_lists
from dynaprune_kernels.backends.triton.kernels.weight_gradient import store_blocks, store_norms


@triton.jit(do_not_specialize=["tokens", "rows", "columns", "capacity", "tokens_per_split"])
def linear_wgrad_kernel(
    x,  # [tokens, x_size], zeros behind inner_size; a tensor descriptor of it with TMA
    dy,  # [tokens, dy_size], zeros behind outer_size; a tensor descriptor of it with TMA
    dvalues,  # [capacity, BI, BO], zeros before
    partial,  # [SPLITS, capacity, BI, BO] float32, or None
    values,  # [capacity, BI, BO], or None
    signed,  # [rows * columns] float32, zeros before, or None
    index,
    tokens,
    x_size,
    dy_size,
    inner_size,
    outer_size,
    rows,
    columns,
    capacity,
    tokens_per_split,
    stride_x,
    stride_dy,
    BI: tl.constexpr,
    BO: tl.constexpr,
    MERGE: tl.constexpr,
    TMA: tl.constexpr,
    RAGGED: tl.constexpr,  # blocks divide one of the sizes not
    SALIENCY: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, row_cols, row_slots = row_lists(index, rows, capacity)
    row, begin, end = chunk_of_program(tl.program_id(0), index, rows, columns, capacity, MERGE)
    if begin >= end:
        return
    split = tl.program_id(1)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)

    m = tl.arange(0, MERGE * BI)  # [MERGE * BI]
    outer = row * BO + tl.arange(0, BO)  # [BO]
    token = tl.arange(0, STEP)  # [STEP]
    acc = tl.zeros([MERGE * BI, BO], tl.float32)
    if TMA:
        block = tl.load(row_cols + begin)
        column = tl.where(below(block, columns), block, columns) * BI  # behind the last: zeros
        for start in range(first, last, STEP):
            x_tile = x.load([start, column])  # [STEP, BI]
            dy_tile = dy.load([start, row * BO])  # [STEP, BO]
            acc = tl.dot(tl.trans(x_tile), dy_tile, acc, input_precision=PRECISION)
    else:
        listed = begin + m // BI < end  # [MERGE * BI]
        block = tl.load(row_cols + begin + m // BI, mask=listed, other=0)
        inner = tl.max_contiguous(tl.multiple_of(block * BI + m % BI, BI), BI)
        inner_valid = listed & below(block, columns)
        outer_valid = outer >= 0
        if RAGGED:
            inner_valid = inner_valid & (inner < x_size)
            outer_valid = outer < dy_size
        # The launcher sees to it that a step's STEP rows lie within 32 bits.
        # x_at: [MERGE * BI, STEP]; dy_at: [STEP, BO]
        x_at = x + first.to(tl.int64) * stride_x + token[None, :] * stride_x + inner[:, None]
        dy_at = dy + first.to(tl.int64) * stride_dy + token[:, None] * stride_dy + outer[None, :]
        for start in range(first, last, STEP):
            valid = start + token < last
            x_tile = tl.load(x_at, mask=valid[None, :] & inner_valid[:, None], other=0.0)
            dy_tile = tl.load(dy_at, mask=valid[:, None] & outer_valid[None, :], other=0.0)
            acc = tl.dot(x_tile, dy_tile, acc, input_precision=PRECISION)
            x_at += STEP * stride_x
            dy_at += STEP * stride_dy
    store_blocks(
        acc, dvalues, partial, values, signed, row_cols, row_slots, row, begin, end, inner_size, outer_size,
        columns, columns, capacity, split, BI, BO, MERGE, RAGGED, SALIENCY, SPLITS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "rows", "columns", "capacity", "search_steps"])
def linear_probe_kernel(
    x,  # [tokens, x_size], zeros behind the inputs
    dy,  # [tokens, dy_size], zeros behind the outputs
    norms,  # [rows * columns] float32
    probe,  # uint8, one element: zeros are written while it is 0
    index,
    tokens,
    x_size,
    dy_size,
    rows,
    columns,
    capacity,
    search_steps,
    stride_x,
    stride_dy,
    BI: tl.constexpr,
    BO: tl.constexpr,
    GI: tl.constexpr,  # block columns per tile
    GO: tl.constexpr,  # block rows per tile
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_ptr, row_cols, _ = row_lists(index, rows, capacity)
    first_row = tl.program_id(0) % tl.cdiv(rows, GO) * GO
    first_column = tl.program_id(0) // tl.cdiv(rows, GO) * GI
    row = first_row + tl.arange(0, GO)[None, :]  # [1, GO]
    column = first_column + tl.arange(0, GI)[:, None]  # [GI, 1]
    inside = (row < rows) & (column < columns)
    # inside, live: [GI, GO]
    live = is_live(row_ptr, row_cols, row, column, inside, capacity, search_steps)
    wanted = tl.sum(tl.sum((inside & (live == 0)).to(tl.int32), axis=1), axis=0)
    acc = tl.zeros([GI * BI, GO * BO], tl.float32)
    if (tl.load(probe) != 0) & (wanted > 0):
        inner = first_column * BI + tl.arange(0, GI * BI)  # [GI * BI]
        outer = first_row * BO + tl.arange(0, GO * BO)  # [GO * BO]
        token = tl.arange(0, STEP)  # [STEP]
        x_at = x + token.to(tl.int64)[None, :] * stride_x + inner[:, None]  # [GI * BI, STEP]
        dy_at = dy + token.to(tl.int64)[:, None] * stride_dy + outer[None, :]  # [STEP, GO * BO]
        inner_valid = (inner < x_size)[:, None]
        outer_valid = (outer < dy_size)[None, :]
        for start in range(0, tokens, STEP):
            valid = start + token < tokens
            x_tile = tl.load(x_at, mask=valid[None, :] & inner_valid, other=0.0)
            dy_tile = tl.load(dy_at, mask=valid[:, None] & outer_valid, other=0.0)
            acc = tl.dot(x_tile, dy_tile, acc, input_precision=PRECISION)
            x_at += STEP * stride_x
            dy_at += STEP * stride_dy
    store_norms(acc, norms, live, row, column, inside, columns, BI, BO, GI, GO)
