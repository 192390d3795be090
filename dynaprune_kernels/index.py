"""The packed index: every index list of a live mask, in one int32 tensor.

One tensor (instead of nine) keeps op schemas short, makes a mask change one version bump that autograd can
see, and gives CUDA graphs one address. Sections, in order::

    header        [8]      n_live, overflow, n_slots, faults, 0, 0, 0, 0
    block_of_slot [cap]    row * columns + column, -1: the slot is free
    row_ptr       [R+1]    live blocks by row, then column
    row_cols      [cap]
    row_slots     [cap]
    col_ptr       [P+1]    live blocks by column list, then tap, then row
    col_rows      [cap]
    col_cols      [cap]
    col_slots     [cap]
    row_order     [R]      rows, the one with most live blocks first
    col_order     [P]      column lists, likewise

Entries past ``n_live`` are -1. ``faults`` counts the numbers in ``slot_of_block`` that were no slots and
the blocks that shared one, where the kernels of an update do not raise: those of the CPU do. A column list
holds what one block of inputs needs for dgrad: all rows and, for a convolution, the taps of one stride
phase. ``P`` is the number of lists: the columns of a linear weight, and ``groups * channel_blocks * stride
phases`` of a convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynaprune_kernels.geometry import ConvGeometry

HEADER = 8
N_LIVE, OVERFLOW, N_SLOTS, FAULTS = 0, 1, 2, 3


class IndexSections(NamedTuple):
    """Views into a packed index (int32, no copies)."""

    header: Tensor
    block_of_slot: Tensor
    row_ptr: Tensor
    row_cols: Tensor
    row_slots: Tensor
    col_ptr: Tensor
    col_rows: Tensor
    col_cols: Tensor
    col_slots: Tensor
    row_order: Tensor
    col_order: Tensor


def column_lists(columns: int, conv: ConvGeometry | None) -> int:
    """Number of column lists ``P`` of a weight with ``columns`` block columns."""
    return columns if conv is None else conv.groups * (columns // conv.taps) * conv.phases


def _section_sizes(rows: int, lists: int, capacity: int) -> list[int]:
    cap = capacity
    return [HEADER, cap, rows + 1, cap, cap, lists + 1, cap, cap, cap, rows, lists]


def index_size(rows: int, lists: int, capacity: int) -> int:
    """Number of int32 elements of a packed index."""
    return sum(_section_sizes(rows, lists, capacity))


def capacity_of_index(index: Tensor, rows: int, lists: int) -> int:
    """The inverse of :func:`index_size`."""
    fixed = index_size(rows, lists, 0)
    return (index.shape[0] - fixed) // (index_size(rows, lists, 1) - fixed)


def sections(index: Tensor, rows: int, capacity: int) -> IndexSections:
    """Cut a packed ``index`` into its named views; the number of column lists follows from its length.

    Raises:
        TypeError: not int32. ValueError: a length that no number of lists explains.
    """
    if index.dtype != torch.int32:
        raise TypeError(f"expected an int32 index, got {index.dtype}")
    without_lists = sum(_section_sizes(rows, 0, capacity))
    lists, odd = divmod(index.numel() - without_lists, 2)
    if index.dim() != 1 or odd or lists < 1:
        raise ValueError(
            f"expected an index of {without_lists} + 2 x lists elements for {rows} block rows and capacity "
            f"{capacity}, got shape {tuple(index.shape)}"
        )
    return IndexSections(*index.split(_section_sizes(rows, lists, capacity)))


def column_list_of_block(rows: int, columns: int, conv: ConvGeometry | None, device: torch.device) -> Tensor:
    """Column list of every block, int64 ``[rows, columns]`` (the order of dgrad's gather)."""
    column = torch.arange(columns, device=device).expand(rows, columns)
    if conv is None:
        return column
    channel_blocks = columns // conv.taps
    tap, channel = column // channel_blocks, column % channel_blocks
    phase_h = (tap // conv.kernel_w * conv.dilation_h) % conv.stride_h
    phase_w = (tap % conv.kernel_w * conv.dilation_w) % conv.stride_w
    row = torch.arange(rows, device=device).unsqueeze(1)
    group = row // max(rows // conv.groups, 1)
    return (group * channel_blocks + channel) * conv.phases + phase_h * conv.stride_w + phase_w
