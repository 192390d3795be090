"""Launcher of the layout kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels.backends.triton.arguments import check_index
from dynaprune_kernels.backends.triton.config import next_power_of_two
from dynaprune_kernels.backends.triton.kernels.layout_update import (
    assign_kernel,
    claim_kernel,
    count_kernel,
    emit_kernel,
    free_kernel,
)
from dynaprune_kernels.backends.triton.launch import launch
from dynaprune_kernels.geometry import ConvGeometry, ceil_div
from dynaprune_kernels.index import column_lists

_LARGEST_CHUNK = 1024


def layout_update(
    mask: Tensor,
    slot_of_block: Tensor,
    index: Tensor,
    capacity: int,
    conv: ConvGeometry | None,
    release: bool,
) -> None:
    """Rebuild slots and indices from ``mask`` in place, without a host sync; safe in a captured graph."""
    rows, columns = mask.shape
    lists = column_lists(columns, conv)
    check_index("layout_update", index, mask, rows, columns, lists, capacity)
    geometry = conv or ConvGeometry(1, 1)
    live = mask.view(torch.uint8)
    work = index.new_empty(3 * rows + lists + capacity + 1)  # the only allocation: see `scratch`
    of_taps = (geometry.kernel_w, *geometry[2:4], *geometry[6:8])
    channel_blocks, rows_per_group = columns // geometry.taps, rows // geometry.groups
    chunk = min(next_power_of_two(max(rows, columns, lists, 128)), _LARGEST_CHUNK)
    index.fill_(-1)
    launch(
        claim_kernel, (rows,), live, slot_of_block, index, work, rows, columns, capacity,
        RELEASE=release, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    launch(
        free_kernel, (max(ceil_div(capacity, _LARGEST_CHUNK), 1),), index, work, rows, lists, capacity,
        CHUNK=_LARGEST_CHUNK, num_warps=4,
    )  # fmt: skip
    launch(
        assign_kernel, (rows,), live, slot_of_block, index, work, rows, columns, lists, capacity,
        CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    launch(
        count_kernel, (lists,), live, work, rows, columns, channel_blocks, rows_per_group, geometry.taps,
        *of_taps, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    launch(
        emit_kernel, (rows + lists,), live, slot_of_block, index, work,
        rows, columns, lists, capacity, channel_blocks, rows_per_group, geometry.taps, *of_taps,
        CHUNK=chunk, num_warps=4,
    )  # fmt: skip
