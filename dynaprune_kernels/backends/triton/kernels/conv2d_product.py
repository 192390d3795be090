"""Forward and dgrad of a 2-D convolution as a matrix product over live (tap, channel block) entries.

Both gather: output position ``(image, j, i)`` reads ``a`` at ``(image, j * step + t, i * step + u)``, where
``t, u`` depend on the tap. For dgrad, positions are those of one stride phase and ``step`` is 1: input row
``h = first + stride * j`` gets tap ``r`` from output row ``(h + padding - r * dilation) / stride``, exact
because the list of the phase holds just those taps. So there are no atomics.
"""

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


@triton.jit
def tap_shift(
    column, channel_blocks, kernel_w, reach_h, reach_w, dil_h, dil_w, stride_h, stride_w, DGRAD: tl.constexpr
):
    """Where a block column's tap reads, against the output position: ``(t, u, channel block)``."""
    tap = column // channel_blocks
    t = tap // kernel_w * dil_h
    u = tap % kernel_w * dil_w
    if DGRAD:
        t = (reach_h - t) // stride_h
        u = (reach_w - u) // stride_w
    else:
        t -= reach_h
        u -= reach_w
    return t, u, column % channel_blocks


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "lists", "capacity", "row_tiles", "images", "a_h", "a_w", "y_h", "y_w",
        "rows_per_group", "channel_blocks", "pad_h", "pad_w",
    ]
)  # fmt: skip
def conv2d_product_kernel(
    a,  # [images, a_h, a_w, a_channels]: x, or dy for dgrad, zeros behind each group's channels
    w,  # values [capacity, BI, BO]
    bias,  # [outer] or None
    y,  # [images, y_h, y_w, y_channels], with room behind each group's channels
    index,
    rows,
    columns,
    lists,
    capacity,
    row_tiles,
    images,
    a_h,
    a_w,
    a_channels,
    a_size,  # channels of ``a`` in one group, for dgrad in all
    inner_size,  # those that are real
    y_h,
    y_w,
    y_channels,
    y_size,  # channels of ``y`` in all, for dgrad in one group
    bias_size,
    channel_blocks,
    rows_per_group,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    BI: tl.constexpr,
    BO: tl.constexpr,
    DGRAD: tl.constexpr,
    RAGGED: tl.constexpr,  # the block's inner width does not divide the channels it sums over
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    INNER: tl.constexpr = BO if DGRAD else BI
    OUTER: tl.constexpr = BI if DGRAD else BO
    order = row_order(index, rows, lists, capacity)
    if DGRAD:
        pointers, col_rows, block_columns, slots = column_lists(index, rows, lists, capacity)
        order += rows
        n_lists = lists
    else:
        pointers, block_columns, slots = row_lists(index, rows, capacity)
        n_lists = rows
    tile, rank = tile_of_program(tl.program_id(0), row_tiles, n_lists, GROUP)
    this = list_at(order, rank, n_lists)

    if DGRAD:
        phases = stride_h * stride_w
        phase = this % phases
        group = this // phases // channel_blocks
        outer_begin = this // phases % channel_blocks * BI
        first_h = ((phase // stride_w - pad_h) % stride_h + stride_h) % stride_h
        first_w = ((phase % stride_w - pad_w) % stride_w + stride_w) % stride_w
        grid_h = (y_h - first_h + stride_h - 1) // stride_h
        grid_w = (y_w - first_w + stride_w - 1) // stride_w
        reach_h = first_h + pad_h
        reach_w = first_w + pad_w
    else:
        group = this // rows_per_group
        outer_begin = this * BO
        grid_h = y_h
        grid_w = y_w
        reach_h = pad_h
        reach_w = pad_w

    count = images * grid_h * grid_w
    first = tile * TILE
    if first >= count:
        return
    position = first + tl.arange(0, TILE)  # [TILE]
    position_valid = position < count
    image = position // (grid_h * grid_w)
    j = position // grid_w % grid_h
    i = position % grid_w
    if DGRAD:
        base_h = j
        base_w = i
        at_h = first_h + stride_h * j
        at_w = first_w + stride_w * i
    else:
        base_h = j * stride_h
        base_w = i * stride_w
        at_h = j
        at_w = i
    # a_base: [TILE], where the output position reads for a tap of shift 0
    a_base = ((image.to(tl.int64) * a_h + base_h) * a_w + base_w) * a_channels
    begin, end = entries_of(pointers, this, capacity)
    k = tl.arange(0, DEPTH)  # [DEPTH]
    acc = tl.zeros([TILE, OUTER], tl.float32)

    if DEPTH <= INNER:  # a block is one step or several
        STEPS: tl.constexpr = INNER // DEPTH
        for step in range(0, (end - begin) * STEPS):
            entry = begin + step // STEPS
            column = tl.load(block_columns + entry)
            slot = tl.load(slots + entry)
            exists = below(column, columns) & below(slot, capacity)
            t, u, channel = tap_shift(
                column, channel_blocks, kernel_w, reach_h, reach_w, dil_h, dil_w, stride_h, stride_w, DGRAD
            )
            k0 = step % STEPS * DEPTH
            if DGRAD:
                row = tl.load(col_rows + entry)
                exists &= below(row, rows)
                inner = row * BO + k0 + k  # [DEPTH]
                a_channel = inner
            else:
                inner = channel * BI + k0 + k  # [DEPTH]
                a_channel = group * a_size + inner
            h = base_h + t
            v = base_w + u
            # inside: [TILE]; a_at, a_tile: [TILE, DEPTH]
            inside = position_valid & exists & (h >= 0) & (h < a_h) & (v >= 0) & (v < a_w)
            a_at = a + (a_base + (t * a_w + u) * a_channels)[:, None] + a_channel[None, :]
            a_mask = inside[:, None]
            if RAGGED:
                a_mask = a_mask & (inner < a_size)[None, :]
            a_tile = tl.load(a_at, mask=a_mask, other=0.0)
            w_tile = load_part(w, slot, exists, k0, inner, inner_size, BI, BO, DEPTH, DGRAD, RAGGED)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
    else:  # small blocks: a step takes several of them, merged along the summed axis
        MERGE: tl.constexpr = DEPTH // INNER
        within = k % INNER
        # entry, valid, column, slot, t, u, channel, inner, a_k: [DEPTH]; h, v, a_tile: [TILE, DEPTH]
        for step in range(0, tl.cdiv(end - begin, MERGE)):
            entry = begin + step * MERGE + k // INNER
            valid = entry < end
            column = tl.load(block_columns + entry, mask=valid, other=0)
            slot = tl.load(slots + entry, mask=valid, other=0)
            t, u, channel = tap_shift(
                column, channel_blocks, kernel_w, reach_h, reach_w, dil_h, dil_w, stride_h, stride_w, DGRAD
            )
            if DGRAD:
                row = tl.load(col_rows + entry, mask=valid, other=0)
                valid &= below(row, rows)
                inner = row * BO + within
                a_channel = inner
            else:
                inner = channel * BI + within
                a_channel = group * a_size + inner
            valid &= below(column, columns) & below(slot, capacity)
            a_valid = valid
            if RAGGED:
                a_valid = valid & (tl.max_contiguous(tl.multiple_of(inner, INNER), INNER) < a_size)
            a_k = (t * a_w + u) * a_channels + a_channel
            a_k = tl.max_contiguous(tl.multiple_of(a_k, 16), INNER)
            h = base_h[:, None] + t[None, :]
            v = base_w[:, None] + u[None, :]
            inside = (h >= 0) & (h < a_h) & (v >= 0) & (v < a_w)
            a_mask = position_valid[:, None] & a_valid[None, :] & inside
            a_tile = tl.load(a + a_base[:, None] + a_k[None, :], mask=a_mask, other=0.0)
            w_tile = load_merged(w, slot, valid, inner, inner_size, BI, BO, DEPTH, DGRAD, RAGGED)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)

    outer = outer_begin + tl.arange(0, OUTER)  # [OUTER]
    outer_valid = outer < y_size
    if bias is not None:
        acc += tl.load(bias + outer, mask=outer < bias_size, other=0.0).to(tl.float32)[None, :]
    y_base = ((image.to(tl.int64) * y_h + at_h) * y_w + at_w) * y_channels
    if DGRAD:
        y_base += group * y_size
    y_at = y + y_base[:, None] + outer[None, :]  # [TILE, OUTER]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=position_valid[:, None] & outer_valid[None, :])
