"""Per block and per neuron sums over values and gradient: one read of each."""

import triton
import triton.language as tl

from dynaprune_kernels.backends.triton.kernels.packed_index import HEADER, below, entries_of, row_lists


@triton.jit(do_not_specialize=["rows", "columns", "capacity"])
def block_saliency_kernel(
    values,  # [capacity, BI, BO]
    grad,  # [capacity, BI, BO]
    stats,  # [4, rows * columns] float32, zeros before
    outputs,  # [capacity, BO] float32: sum over inputs of w g, by entry of the row lists
    index,
    rows,
    columns,
    capacity,
    BI: tl.constexpr,
    BO: tl.constexpr,
    ROWS: tl.constexpr,  # of a block, read at once
):
    """One live block: sums of w^2, g^2, |w g| and w g."""
    entry = tl.program_id(0)
    if entry >= tl.load(index):
        return
    _, _, row_slots = row_lists(index, rows, capacity)
    slot = tl.load(row_slots + entry)
    exists = below(slot, capacity)
    block = tl.load(index + HEADER + slot, mask=exists, other=-1)
    slot = slot.to(tl.int64)
    n = tl.arange(0, BO)
    ww = tl.zeros([BO], tl.float32)
    gg = tl.zeros([BO], tl.float32)
    absolute = tl.zeros([BO], tl.float32)
    signed = tl.zeros([BO], tl.float32)
    for start in tl.static_range(0, BI, ROWS):
        m = start + tl.arange(0, ROWS)
        at = slot * (BI * BO) + m[:, None] * BO + n[None, :]  # [ROWS, BO]
        w = tl.load(values + at, mask=exists, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
        ww += tl.sum(w * w, axis=0)
        gg += tl.sum(g * g, axis=0)
        absolute += tl.sum(tl.abs(w * g), axis=0)
        signed += tl.sum(w * g, axis=0)
    tl.store(outputs + entry.to(tl.int64) * BO + n, signed)
    blocks = rows.to(tl.int64) * columns
    here = stats + block
    real = below(block, rows * columns)
    tl.store(here, tl.sum(ww, axis=0), mask=real)
    tl.store(here + blocks, tl.sum(gg, axis=0), mask=real)
    tl.store(here + 2 * blocks, tl.sum(absolute, axis=0), mask=real)
    tl.store(here + 3 * blocks, tl.sum(signed, axis=0), mask=real)


@triton.jit(do_not_specialize=["rows", "capacity"])
def neuron_saliency_kernel(
    outputs,  # [capacity, BO] float32
    neuron,  # [rows * BO] float32
    index,
    rows,
    capacity,
    BO: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One block row: the sums of its blocks, added up in the order of the list."""
    row = tl.program_id(0)
    row_ptr, _, _ = row_lists(index, rows, capacity)
    begin, end = entries_of(row_ptr, row, capacity)
    n = tl.arange(0, BO)
    total = tl.zeros([ENTRIES, BO], tl.float32)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        at = outputs + entry.to(tl.int64)[:, None] * BO + n[None, :]  # [ENTRIES, BO]
        total += tl.load(at, mask=(entry < end)[:, None], other=0.0)
    tl.store(neuron + row.to(tl.int64) * BO + n, tl.sum(total, axis=0))
