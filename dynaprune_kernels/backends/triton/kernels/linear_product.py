"""Forward and dgrad of a linear layer: one output tile per program, over the live blocks of one list."""

import triton
import triton.language as tl

from dynaprune_kernels.backends.triton.kernels.packed_index import (
    below,
    column_lists,
    entries_of,
    list_at,
    row_lists,
    row_order,
    tile_of_program,
)
from dynaprune_kernels.backends.triton.kernels.product import load_merged, load_part


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
        n_blocks = rows
    else:
        pointers, inner_blocks, slots = row_lists(index, rows, capacity)
        n_lists = rows
        n_blocks = lists
    tile, rank = tile_of_program(tl.program_id(0), tl.cdiv(tokens, TILE), n_lists, GROUP)
    this = list_at(order, rank, n_lists)
    begin, end = entries_of(pointers, this, capacity)

    first_token = tile * TILE
    token = first_token + tl.arange(0, TILE)  # [TILE]
    token_valid = token < tokens
    k = tl.arange(0, DEPTH)  # [DEPTH]
    acc = tl.zeros([TILE, OUTER], tl.float32)
    if not TMA:
        a_rows = a + token.to(tl.int64)[:, None] * stride_a  # [TILE, 1]

    if DEPTH <= INNER:  # a block is one step or several
        STEPS: tl.constexpr = INNER // DEPTH
        for step in range(0, (end - begin) * STEPS):
            entry = begin + step // STEPS
            block = tl.load(inner_blocks + entry)
            slot = tl.load(slots + entry)
            exists = below(block, n_blocks) & below(slot, capacity)
            k0 = step % STEPS * DEPTH
            if TMA:
                block = tl.where(exists, block, n_blocks)  # behind the last: zeros
                slot = tl.where(exists, slot, capacity)
                a_tile = a.load([first_token, block * INNER + k0])  # [TILE, DEPTH]
                if DGRAD:
                    w_tile = tl.trans(w.load([slot * BI, k0]))  # [DEPTH, BI]
                else:
                    w_tile = w.load([slot * BI + k0, 0])  # [DEPTH, BO]
            else:
                column = block * INNER + k0 + k  # [DEPTH]
                a_mask = (token_valid & exists)[:, None]
                if RAGGED:
                    a_mask = a_mask & (column < a_size)[None, :]
                a_tile = tl.load(a_rows + column[None, :], mask=a_mask, other=0.0)  # [TILE, DEPTH]
                w_tile = load_part(w, slot, exists, k0, column, inner_size, BI, BO, DEPTH, DGRAD, RAGGED)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
    else:  # small blocks: a step takes several of them, merged along the summed axis
        MERGE: tl.constexpr = DEPTH // INNER
        for step in range(0, tl.cdiv(end - begin, MERGE)):
            entry = begin + step * MERGE + k // INNER  # [DEPTH]
            valid = entry < end
            block = tl.load(inner_blocks + entry, mask=valid, other=0)
            slot = tl.load(slots + entry, mask=valid, other=0)
            valid &= below(block, n_blocks) & below(slot, capacity)
            column = tl.max_contiguous(tl.multiple_of(block * INNER + k % INNER, INNER), INNER)
            a_valid = valid
            if RAGGED:
                a_valid = valid & (column < a_size)
            a_mask = token_valid[:, None] & a_valid[None, :]
            a_tile = tl.load(a_rows + column[None, :], mask=a_mask, other=0.0)  # [TILE, DEPTH]
            w_tile = load_merged(w, slot, valid, column, inner_size, BI, BO, DEPTH, DGRAD, RAGGED)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)

    column = this * OUTER + tl.arange(0, OUTER)  # [OUTER]
    column_valid = column < outer_size
    if bias is not None:
        acc += tl.load(bias + column, mask=column_valid, other=0.0).to(tl.float32)[None, :]
    y_at = y + token.to(tl.int64)[:, None] * outer_size + column[None, :]  # [TILE, OUTER]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=token_valid[:, None] & column_valid[None, :])
