"""Device side of :mod:`dynaprune_kernels.index`: where the sections lie, and searches in them.

Sections are found by arithmetic on one base pointer: separate pointers would be specialised by their
alignment, which changes with the capacity, so that every compaction would compile anew.
"""

import triton
import triton.language as tl

HEADER = tl.constexpr(8)


@triton.jit
def row_lists(index, rows, capacity):
    """Pointers to ``row_ptr``, ``row_cols`` and ``row_slots``."""
    row_ptr = index + HEADER + capacity
    return row_ptr, row_ptr + rows + 1, row_ptr + rows + 1 + capacity


@triton.jit
def column_lists(index, rows, lists, capacity):
    """Pointers to ``col_ptr``, ``col_rows``, ``col_cols`` and ``col_slots``."""
    col_ptr = index + HEADER + 3 * capacity + rows + 1
    col_rows = col_ptr + lists + 1
    return col_ptr, col_rows, col_rows + capacity, col_rows + 2 * capacity


@triton.jit
def row_order(index, rows, lists, capacity):
    """Pointer to ``row_order``; ``col_order`` lies ``rows`` behind it."""
    return index + HEADER + 6 * capacity + rows + 1 + lists + 1


@triton.jit
def tile_of_program(program, row_tiles, lists, GROUP: tl.constexpr):
    """``(row tile, rank of the list)``: GROUP row tiles share a list's blocks in L2, long lists first."""
    first = program // (GROUP * lists) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * lists)
    return first + within % size, within // size


@triton.jit
def chunk_of_program(program, index, rows, columns, capacity, MERGE: tl.constexpr):
    """``(row, first entry, end)`` of the ``program``-th chunk of at most MERGE live blocks of one row.

    Row r owns the chunks from ``row_ptr[r] // MERGE + r``, which leaves it enough of them and grows with r,
    so that the row is found by bisection. First entry >= end: nothing to do.
    """
    row_ptr, _, row_slots = row_lists(index, rows, capacity)
    if MERGE == 1:
        end = tl.minimum(program + 1, tl.load(index))
        slot = tl.load(row_slots + program, mask=program < end, other=0)
        return tl.load(index + HEADER + slot) // columns, program, end
    else:
        low = program * 0
        high = rows - 1
        while low < high:
            middle = (low + high + 1) // 2
            starts = tl.load(row_ptr + middle) // MERGE + middle <= program
            low = tl.where(starts, middle, low)
            high = tl.where(starts, high, middle - 1)
        begin = tl.load(row_ptr + low)
        end = tl.load(row_ptr + low + 1)
        return low, begin + (program - begin // MERGE - low) * MERGE, end


@triton.jit
def is_live(row_ptr, row_cols, row, column, inside, steps):
    """Whether each block ``(row, column)`` is listed: bisection in the row's ascending columns, element-wise.

    Args:
        inside: where ``row`` and ``column`` lie in the grid.
        steps: at least log2(columns) + 1.
    """
    low = tl.load(row_ptr + row, mask=inside, other=0)
    end = tl.load(row_ptr + row + 1, mask=inside, other=0)
    high = end
    for _ in range(0, steps):
        middle = (low + high) // 2
        open_ = low < high
        before = tl.load(row_cols + middle, mask=open_, other=0) < column
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
    found = low < end
    return found & (tl.load(row_cols + low, mask=found, other=-1) == column)
