"""A live mask into slots and index lists, on the device.

Five launches, each of which needs all of the one before: ``claim`` (which blocks keep a slot, want one, free
one), ``free`` (the free slots, in order), ``assign`` (slots to the blocks that want one), ``count`` (live
blocks of each column list) and ``emit`` (every list). A program sums the counts before its own part itself,
which costs less than a launch for a scan as long as there are thousands of rows and not millions.

What ``slot_of_block`` holds is not trusted: a number that is neither a slot nor -1 takes its block out of the
mask, and no list is written beyond the capacity. The header counts such numbers and the blocks beyond one
that share a slot.
"""

import triton
import triton.language as tl

from dynaprune_kernels.backends.triton.kernels.packed_index import (
    HEADER,
    below,
    column_lists,
    row_lists,
    row_order,
)


@triton.jit
def scratch(work, rows):
    """Sections of ``work [3 * rows + lists + capacity + 1]``, int32, whose contents do not outlive an update.

    Returns:
        ``wanting [rows]``: live blocks without a slot; ``holding [rows]``: blocks with one, or with a number
        that is none; ``live_of_row [rows]``; and what comes behind: ``live_of_list [lists]``, then
        ``free_slots [capacity]`` and their number.
    """
    return work, work + rows, work + 2 * rows, work + 3 * rows


@triton.jit
def sum_before(counts, stop, CHUNK: tl.constexpr):
    """Sum of ``counts[:stop]``."""
    total = tl.zeros([CHUNK], tl.int32)
    for start in range(0, stop, CHUNK):
        at = start + tl.arange(0, CHUNK)
        total += tl.load(counts + at, mask=at < stop, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def rank_of(counts, this, size, CHUNK: tl.constexpr):
    """Place of ``this`` when ``counts[:size]`` is sorted, most first, ties in order."""
    own = tl.load(counts + this)
    before = tl.zeros([CHUNK], tl.int32)
    for start in range(0, size, CHUNK):
        at = start + tl.arange(0, CHUNK)
        count = tl.load(counts + at, mask=at < size, other=-1)
        before += ((count > own) | ((count == own) & (at < this))).to(tl.int32)
    return tl.sum(before, axis=0)


@triton.jit(do_not_specialize=["rows", "columns", "capacity"])
def claim_kernel(
    mask,  # [rows, columns] uint8
    slot_of_block,  # [rows, columns] int32
    index,  # block_of_slot is -1 everywhere before
    work,
    rows,
    columns,
    capacity,
    RELEASE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    wanting, holding, _, _ = scratch(work, rows)
    wants = tl.zeros([CHUNK], tl.int32)
    holds = tl.zeros([CHUNK], tl.int32)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < columns
        block = row * columns + column
        live = tl.load(mask + block, mask=inside, other=0) != 0
        slot = tl.load(slot_of_block + block, mask=inside, other=-1)
        if RELEASE:
            slot = tl.where(live, slot, tl.minimum(slot, -1))
            tl.store(slot_of_block + block, slot, mask=inside)
        tl.store(index + HEADER + slot, block, mask=below(slot, capacity))
        wants += (live & (slot == -1)).to(tl.int32)
        holds += (slot != -1).to(tl.int32)
    tl.store(wanting + row, tl.sum(wants, axis=0))
    tl.store(holding + row, tl.sum(holds, axis=0))


@triton.jit(do_not_specialize=["rows", "lists", "capacity"])
def free_kernel(index, work, rows, lists, capacity, CHUNK: tl.constexpr):
    """The free slots of one chunk of slots, behind those of the chunks before."""
    _, _, _, live_of_list = scratch(work, rows)
    free_slots = live_of_list + lists
    chunk = tl.program_id(0) * CHUNK
    before = tl.zeros([CHUNK], tl.int32)
    for start in range(0, chunk, CHUNK):
        before += (tl.load(index + HEADER + start + tl.arange(0, CHUNK)) < 0).to(tl.int32)
    slot = chunk + tl.arange(0, CHUNK)
    free = (tl.load(index + HEADER + slot, mask=slot < capacity, other=0) < 0).to(tl.int32)
    place = tl.sum(before, axis=0) + tl.cumsum(free, axis=0) - 1
    tl.store(free_slots + place, slot, mask=free != 0)
    if chunk + CHUNK >= capacity:
        tl.store(free_slots + capacity, tl.sum(before + free, axis=0))


@triton.jit(do_not_specialize=["rows", "columns", "lists", "capacity"])
def assign_kernel(
    mask,
    slot_of_block,
    index,
    work,
    rows,
    columns,
    lists,
    capacity,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    wanting, holding, live_of_row, live_of_list = scratch(work, rows)
    free_slots = live_of_list + lists
    rank = sum_before(wanting, row, CHUNK)
    held = sum_before(holding, rows, CHUNK)
    n_free = capacity - held
    lives = tl.zeros([CHUNK], tl.int32)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < columns
        block = row * columns + column
        live = tl.load(mask + block, mask=inside, other=0) != 0
        slot = tl.load(slot_of_block + block, mask=inside, other=-1)
        wants = live & (slot == -1)
        place = rank + tl.cumsum(wants.to(tl.int32), axis=0) - 1
        served = wants & (place < n_free)
        wrong = (slot != -1) & (below(slot, capacity) == 0)
        slot = tl.where(served | wrong, tl.load(free_slots + place, mask=served, other=-1), slot)
        tl.store(slot_of_block + block, slot, mask=served | wrong)
        tl.store(index + HEADER + slot, block, mask=served)
        live = live & (slot >= 0)
        tl.store(mask + block, live.to(tl.uint8), mask=inside)
        lives += live.to(tl.int32)
        rank += tl.sum(wants.to(tl.int32), axis=0)
    tl.store(live_of_row + row, tl.sum(lives, axis=0))
    if row == rows - 1:  # ``rank`` now counts every block that wanted a slot
        free = tl.load(free_slots + capacity)
        served = tl.maximum(tl.minimum(rank, n_free), 0)
        tl.store(index + 1, rank - served)
        tl.store(index + 2, capacity - free + served)
        tl.store(index + 3, free - n_free)
        tl.store(index + 4 + tl.arange(0, 4), 0)


@triton.jit
def tap_in_list(tap, list_, kernel_w, stride_h, stride_w, dil_h, dil_w):
    """Whether a tap belongs to the stride phase of a column list."""
    phase = tap // kernel_w * dil_h % stride_h * stride_w + tap % kernel_w * dil_w % stride_w
    return phase == list_ % (stride_h * stride_w)


@triton.jit(do_not_specialize=["rows", "columns", "channel_blocks", "rows_per_group", "taps"])
def count_kernel(
    mask,
    work,
    rows,
    columns,
    channel_blocks,
    rows_per_group,
    taps,
    kernel_w,
    stride_h,
    stride_w,
    dil_h,
    dil_w,
    CHUNK: tl.constexpr,
):
    list_ = tl.program_id(0)
    _, _, _, live_of_list = scratch(work, rows)
    channel_list = list_ // (stride_h * stride_w)
    first_row = channel_list // channel_blocks * rows_per_group
    lives = tl.zeros([CHUNK], tl.int32)
    for tap in range(0, taps):
        if tap_in_list(tap, list_, kernel_w, stride_h, stride_w, dil_h, dil_w):
            column = tap * channel_blocks + channel_list % channel_blocks
            for start in range(0, rows_per_group, CHUNK):
                row = start + tl.arange(0, CHUNK)
                at = mask + (first_row + row) * columns + column
                lives += (tl.load(at, mask=row < rows_per_group, other=0) != 0).to(tl.int32)
    tl.store(live_of_list + list_, tl.sum(lives, axis=0))


@triton.jit(
    do_not_specialize=["rows", "columns", "lists", "capacity", "channel_blocks", "rows_per_group", "taps"]
)
def emit_kernel(
    mask,
    slot_of_block,
    index,
    work,
    rows,
    columns,
    lists,
    capacity,
    channel_blocks,
    rows_per_group,
    taps,
    kernel_w,
    stride_h,
    stride_w,
    dil_h,
    dil_w,
    CHUNK: tl.constexpr,
):
    """Programs below ``rows`` write one row's entries, the others one column list's."""
    program = tl.program_id(0)
    _, _, live_of_row, live_of_list = scratch(work, rows)
    order = row_order(index, rows, lists, capacity)
    if program < rows:
        row = program
        row_ptr, row_cols, row_slots = row_lists(index, rows, capacity)
        entry = sum_before(live_of_row, row, CHUNK)
        tl.store(order + rank_of(live_of_row, row, rows, CHUNK), row)
        if row == 0:
            tl.store(row_ptr, 0)
        for start in range(0, columns, CHUNK):
            column = start + tl.arange(0, CHUNK)
            block = row * columns + column
            live = (tl.load(mask + block, mask=column < columns, other=0) != 0).to(tl.int32)
            at = entry + tl.cumsum(live, axis=0) - 1
            listed = (live != 0) & below(at, capacity)
            tl.store(row_cols + at, column, mask=listed)
            slot = tl.load(slot_of_block + block, mask=listed, other=-1)
            tl.store(row_slots + at, slot, mask=listed)
            entry += tl.sum(live, axis=0)
        tl.store(row_ptr + row + 1, entry)
        if row == rows - 1:
            tl.store(index, entry)
    else:
        list_ = program - rows
        col_ptr, col_rows, col_cols, col_slots = column_lists(index, rows, lists, capacity)
        entry = sum_before(live_of_list, list_, CHUNK)
        tl.store(order + rows + rank_of(live_of_list, list_, lists, CHUNK), list_)
        if list_ == 0:
            tl.store(col_ptr, 0)
        channel_list = list_ // (stride_h * stride_w)
        first_row = channel_list // channel_blocks * rows_per_group
        for tap in range(0, taps):
            if tap_in_list(tap, list_, kernel_w, stride_h, stride_w, dil_h, dil_w):
                column = tap * channel_blocks + channel_list % channel_blocks
                for start in range(0, rows_per_group, CHUNK):
                    within = start + tl.arange(0, CHUNK)
                    row = first_row + within
                    block = row * columns + column
                    live = tl.load(mask + block, mask=within < rows_per_group, other=0) != 0
                    at = entry + tl.cumsum(live.to(tl.int32), axis=0) - 1
                    listed = live & below(at, capacity)
                    tl.store(col_rows + at, row, mask=listed)
                    tl.store(col_cols + at, tl.zeros([CHUNK], tl.int32) + column, mask=listed)
                    slot = tl.load(slot_of_block + block, mask=listed, other=-1)
                    tl.store(col_slots + at, slot, mask=listed)
                    entry += tl.sum(live.to(tl.int32), axis=0)
        tl.store(col_ptr + list_ + 1, entry)
