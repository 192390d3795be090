"""Forward and dgrad of a linear layer: one output tile per program, over the live blocks of one list."""

import triton
import triton.language as tl

from dynaprune_kernels.backends.triton.kernels.packed_index import (
    column_lists,
    row_lists,
    row_order,
    tile_of_program,
)


@triton.jit(do_not_specialize=["tokens", "rows", "lists", "capacity"])
def linear_product_kernel(
    a,  # [tokens, a_size]: x, or dy for dgrad, zeros behind inner_size; a tensor descriptor of it with TMA
    w,  # values [capacity, BI, BO]; with TMA a tensor descriptor of [capacity * BI, BO]
    bias,  # [outer] or None
    y,  # [tokens, outer], contiguous
    index,
    tokens,
    a_size,
    inner_size,
    outer_size,
    rows,
    lists,
    capacity,
    stride_a,
    BI: tl.constexpr,
    BO: tl.constexpr,
    DGRAD: tl.constexpr,
    TMA: tl.constexpr,
    RAGGED: tl.constexpr,  # the block's inner width does not divide inner_size
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    INNER: tl.constexpr = BO if DGRAD else BI
    OUTER: tl.constexpr = BI if DGRAD else BO
    order = row_order(index, rows, lists, capacity)
    if DGRAD:
        pointers, inner_blocks, _, slots = column_lists(index, rows, lists, capacity)
        order += rows
        n_lists = lists
    else:
        pointers, inner_blocks, slots = row_lists(index, rows, capacity)
        n_lists = rows
    tile, rank = tile_of_program(tl.program_id(0), tl.cdiv(tokens, TILE), n_lists, GROUP)
    this = tl.load(order + rank)
    begin = tl.load(pointers + this)
    end = tl.load(pointers + this + 1)

    token = tl.arange(0, TILE)  # within the tile
    first_token = tile * TILE
    token_valid = first_token + token < tokens
    k = tl.arange(0, DEPTH)
    n = tl.arange(0, OUTER)
    acc = tl.zeros([TILE, OUTER], tl.float32)
    if not TMA:
        a_rows = a + first_token.to(tl.int64) * stride_a + token[:, None] * stride_a

    if DEPTH <= INNER:  # a block is one step or several
        STEPS: tl.constexpr = INNER // DEPTH
        for step in range(0, (end - begin) * STEPS):
            entry = begin + step // STEPS
            block = tl.load(inner_blocks + entry)
            slot = tl.load(slots + entry)
            k0 = step % STEPS * DEPTH
            if TMA:
                a_tile = a.load([first_token, block * INNER + k0])
                if DGRAD:
                    w_tile = tl.trans(w.load([slot * BI, k0]))
                else:
                    w_tile = w.load([slot * BI + k0, 0])
            else:
                column = block * INNER + k0 + k
                w_block = w + slot.to(tl.int64) * (BI * BO)
                a_mask = token_valid[:, None]
                if RAGGED:
                    a_mask = a_mask & (column < a_size)[None, :]
                a_tile = tl.load(a_rows + column[None, :], mask=a_mask, other=0.0)
                if DGRAD:
                    w_at = w_block + (k0 + k)[:, None] + n[None, :] * BO
                else:
                    w_at = w_block + (k0 + k)[:, None] * BO + n[None, :]
                w_tile = tl.load(w_at)
                if RAGGED:  # not a mask of the load, which would make it one of single elements
                    w_tile = tl.where((column < inner_size)[:, None], w_tile, 0.0)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
    else:  # small blocks: a step takes several of them, merged along the summed axis
        MERGE: tl.constexpr = DEPTH // INNER
        within = k % INNER
        for step in range(0, tl.cdiv(end - begin, MERGE)):
            entry = begin + step * MERGE + k // INNER
            valid = entry < end
            block = tl.load(inner_blocks + entry, mask=valid, other=0)
            slot = tl.load(slots + entry, mask=valid, other=0)
            column = tl.max_contiguous(tl.multiple_of(block * INNER + within, INNER), INNER)
            a_valid = valid
            if RAGGED:
                a_valid = valid & (column < a_size)
            a_tile = tl.load(
                a_rows + column[None, :], mask=token_valid[:, None] & a_valid[None, :], other=0.0
            )
            w_block = slot.to(tl.int64) * (BI * BO)
            if DGRAD:
                w_k = tl.max_contiguous(tl.multiple_of(w_block + within, BO), BO)
                w_at = w + w_k[:, None] + n[None, :] * BO
            else:
                w_at = w + (w_block + within * BO)[:, None] + n[None, :]
            w_tile = tl.load(w_at, mask=valid[:, None], other=0.0)
            if RAGGED:
                w_tile = tl.where((column < inner_size)[:, None], w_tile, 0.0)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)

    column = this * OUTER + n
    column_valid = column < outer_size
    if bias is not None:
        acc += tl.load(bias + column, mask=column_valid, other=0.0).to(tl.float32)[None, :]
    y_at = y + first_token.to(tl.int64) * outer_size + token[:, None] * outer_size + column[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=token_valid[:, None] & column_valid[None, :])
