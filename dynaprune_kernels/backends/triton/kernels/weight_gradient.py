"""Gradients of live blocks: what linear and conv2d share, and the second pass of a split over tokens."""

import triton
import triton.language as tl

from dynaprune_kernels.backends.triton.kernels.packed_index import HEADER, below, row_lists


@triton.jit
def store_blocks(
    acc,  # [MERGE * BI, BO] float32
    dvalues,
    partial,
    values,
    signed,
    row_cols,
    row_slots,
    row,
    begin,
    end,
    inner_size,
    outer_size,
    columns,
    channel_blocks,
    capacity,
    split,
    BI: tl.constexpr,
    BO: tl.constexpr,
    MERGE: tl.constexpr,
    RAGGED: tl.constexpr,
    SALIENCY: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write the blocks of entries ``begin..begin + MERGE`` of ``row``, exact zeros in their padding.

    With one split to ``dvalues``, and with SALIENCY the sum of weight x gradient to ``signed``; else to
    ``partial [SPLITS, capacity, BI, BO]``.
    """
    m = tl.arange(0, MERGE * BI)
    n = tl.arange(0, BO)
    listed = begin + m // BI < end  # [MERGE * BI], as slot, inner
    slot = tl.load(row_slots + begin + m // BI, mask=listed, other=-1)
    mask = below(slot, capacity)[:, None] & (n[None, :] < BO)  # [MERGE * BI, BO], as real, at, weight
    slot = slot.to(tl.int64)
    if RAGGED:
        block_column = tl.load(row_cols + begin + m // BI, mask=listed, other=0)
        inner = block_column % channel_blocks * BI + m % BI < inner_size
        real = mask & inner[:, None] & (row * BO + n < outer_size)[None, :]
        acc = tl.where(real, acc, 0.0)
    else:
        real = mask
    if SPLITS > 1:
        at = partial + (split.to(tl.int64) * capacity + slot[:, None]) * (BI * BO)
        tl.store(at + (m % BI)[:, None] * BO + n[None, :], acc, mask=mask)
    else:
        at = slot[:, None] * (BI * BO) + (m % BI)[:, None] * BO + n[None, :]
        tl.store(dvalues + at, acc.to(dvalues.dtype.element_ty), mask=mask)
        if SALIENCY:
            weight = tl.load(values + at, mask=real, other=0.0).to(tl.float32)
            total = tl.sum(tl.reshape(tl.sum(acc * weight, axis=1), [MERGE, BI]), axis=1)  # [MERGE]
            entry = begin + tl.arange(0, MERGE)
            column = tl.load(row_cols + entry, mask=entry < end, other=-1)
            tl.store(signed + row.to(tl.int64) * columns + column, total, mask=below(column, columns))


@triton.jit(do_not_specialize=["rows", "columns", "channel_blocks", "capacity", "splits"])
def sum_splits_kernel(
    partial,  # [splits, capacity, BI, BO] float32
    dvalues,
    values,
    signed,
    index,
    inner_size,
    outer_size,
    rows,
    columns,
    channel_blocks,
    capacity,
    splits,
    BI: tl.constexpr,
    BO: tl.constexpr,
    RAGGED: tl.constexpr,
    SALIENCY: tl.constexpr,
    ROWS: tl.constexpr,  # of a block, held at once
):
    """The second pass: partial sums of one live block added up in a fixed order, then written."""
    entry = tl.program_id(0)
    if entry >= tl.load(index):
        return
    _row_ptr, row_cols, row_slots = row_lists(index, rows, capacity)
    column = tl.load(row_cols + entry)
    slot = tl.load(row_slots + entry)
    block = tl.load(index + HEADER + slot, mask=below(slot, capacity), other=-1)
    if (below(block, rows * columns) & below(column, columns) if SALIENCY else below(slot, capacity)) == 0:
        return
    row = block // columns
    slot = slot.to(tl.int64)
    n = tl.arange(0, BO)
    total = tl.zeros([BO], tl.float32)
    for start in range(0, BI, ROWS):
        m = start + tl.arange(0, ROWS)
        at = slot * (BI * BO) + m[:, None] * BO + n[None, :]  # [ROWS, BO]
        acc = tl.zeros([ROWS, BO], tl.float32)
        here = partial + at
        for _ in range(0, splits):
            acc += tl.load(here)
            here += capacity.to(tl.int64) * (BI * BO)
        tl.store(dvalues + at, acc.to(dvalues.dtype.element_ty))
        if SALIENCY:
            if RAGGED:
                inner = column % channel_blocks * BI + m < inner_size
                real = inner[:, None] & (row * BO + n < outer_size)[None, :]
                weight = tl.load(values + at, mask=real, other=0.0)
            else:
                weight = tl.load(values + at)
            total += tl.sum(acc * weight.to(tl.float32), axis=0)
    if SALIENCY:
        tl.store(signed + row.to(tl.int64) * columns + column, tl.sum(total, axis=0))


@triton.jit
def store_norms(
    acc,  # [GI * BI, GO * BO] float32: the dense gradient's tile
    norms,
    live,  # [GI, GO]
    row,  # [1, GO]
    column,  # [GI, 1]
    inside,
    columns,
    BI: tl.constexpr,
    BO: tl.constexpr,
    GI: tl.constexpr,
    GO: tl.constexpr,
):
    """Squared norms of the tile's blocks; zeros at live ones."""
    outputs = tl.sum(tl.reshape(acc * acc, [GI * BI, GO, BO]), axis=2)  # [GI * BI, GO]
    square = tl.sum(tl.reshape(outputs, [GI, BI, GO]), axis=1)  # [GI, GO]
    at = norms + row.to(tl.int64) * columns + column
    tl.store(at, tl.where(live, 0.0, square), mask=inside)
