"""Device side of :mod:`dynaprune_kernels.index`: where the sections lie, and searches in them.

Sections are found by arithmetic on one base pointer: separate pointers would be specialised by their
alignment, which changes with the capacity, so that every compaction would compile anew.

Nothing in an index is trusted, since anything may have written to it. A number is compared with its bound,
unsigned, between being read and being used, so that no access leaves the index or a tensor and no loop is
longer than the capacity. What such a number spoils counts as absent: a block, or all of a list whose pointers
are wrong. Results of an index that is wrong are not defined.
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
def below(number, bound):
    """Whether ``0 <= number < bound``, element-wise, in one comparison."""
    # ``True &`` makes it a boolean in the interpreter, where a splat else has the dtype of what was compared.
    return True & (number.to(tl.uint32) < bound.to(tl.uint32))


@triton.jit
def end_of_list(begin, end, capacity):
    """``end``, or ``begin`` where these are not pointers of a list below the capacity; element-wise."""
    right = (begin.to(tl.uint32) <= end.to(tl.uint32)) & (end.to(tl.uint32) <= capacity.to(tl.uint32))
    return tl.where(right, end, begin)


@triton.jit
def entries_of(pointers, this, capacity):
    """``(begin, end)``: where the entries of a list lie."""
    begin = tl.load(pointers + this)
    return begin, end_of_list(begin, tl.load(pointers + this + 1), capacity)


@triton.jit
def list_at(order, rank, lists):
    """The list at a rank; one of the same number where the order names none, so that outputs are written."""
    this = tl.load(order + rank)
    return tl.where(below(this, lists), this, rank)


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
        slot = tl.load(row_slots + program, mask=program < tl.load(index), other=-1)
        block = tl.load(index + HEADER + slot, mask=below(slot, capacity), other=-1)
        return block // columns, program, program + below(block, rows * columns).to(tl.int32)
    else:
        low = program * 0
        high = rows - 1
        while low < high:
            middle = (low + high + 1) // 2
            starts = tl.load(row_ptr + middle) // MERGE + middle <= program
            low = tl.where(starts, middle, low)
            high = tl.where(starts, high, middle - 1)
        begin, end = entries_of(row_ptr, low, capacity)
        # At least ``begin``, however wrong pointers led the bisection.
        return low, tl.maximum(begin + (program - begin // MERGE - low) * MERGE, begin), end


@triton.jit
def is_live(row_ptr, row_cols, row, column, inside, capacity, steps):
    """Whether each block ``(row, column)`` is listed: bisection in the row's ascending columns, element-wise.

    Args:
        inside: where ``row`` and ``column`` lie in the grid.
        steps: at least log2(columns) + 1.
    """
    low = tl.load(row_ptr + row, mask=inside, other=0)
    end = end_of_list(low, tl.load(row_ptr + row + 1, mask=inside, other=0), capacity)
    high = end
    for _ in range(0, steps):
        middle = (low + high) // 2
        open_ = low < high
        before = tl.load(row_cols + middle, mask=open_, other=0) < column
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
    found = low < end
    return found & (tl.load(row_cols + low, mask=found, other=-1) == column)
