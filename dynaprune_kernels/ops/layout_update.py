"""``layout_update``: a new live mask into slots and index lists, in place and on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels.backends.dispatch import select
from dynaprune_kernels.backends.memory import check_memory
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.geometry import ConvGeometry, check_int32
from dynaprune_kernels.index import column_lists, index_size
from dynaprune_kernels.ops.registration import define, fake, implement

define(
    "layout_update(Tensor(a!) mask, Tensor(b!) slot_of_block, Tensor(c!) index, SymInt capacity, "
    "int[]? conv, bool release) -> ()"
)


def _check(
    mask: Tensor, slot_of_block: Tensor, index: Tensor, capacity: int, conv: ConvGeometry | None
) -> None:
    """Raise TypeError or ValueError where the tensors are not those of one layout, whatever the backend."""
    tensors = {"mask": mask, "slot_of_block": slot_of_block, "index": index}
    dtypes = (torch.bool, torch.int32, torch.int32)
    for (name, tensor), dtype in zip(tensors.items(), dtypes, strict=True):
        if tensor.dtype != dtype:
            raise TypeError(f"layout_update: expected a {dtype} {name}, got {tensor.dtype}")
        if tensor.device != mask.device or tensor.layout != torch.strided:
            raise ValueError(
                f"layout_update: expected a dense {name} on {mask.device}, got {tensor.layout} on "
                f"{tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"layout_update: expected contiguous {name}, got strides {tensor.stride()}")
        check_memory("layout_update", name, tensor)
    if mask.dim() != 2 or slot_of_block.shape != mask.shape or mask.numel() == 0:
        raise ValueError(
            f"layout_update: expected mask and slot_of_block [rows, columns] of at least one block, "
            f"got shapes {list(mask.shape)} and {list(slot_of_block.shape)}"
        )
    rows, columns = mask.shape
    check_int32(rows, columns)
    if conv is not None:
        least = [1, 1, 1, 1, 0, 0, 1, 1, 1]
        if not all(low <= number < 2**31 for low, number in zip(least, conv, strict=True)):
            raise ValueError(f"layout_update: expected numbers of a convolution, got {conv}")
        if rows % conv.groups or columns % conv.taps:
            raise ValueError(
                f"layout_update: expected block rows divisible by {conv.groups} groups and block columns by "
                f"{conv.taps} taps, got {rows} and {columns}"
            )
    lists = column_lists(columns, conv)
    if capacity < 0 or index.shape != (index_size(rows, lists, capacity),):
        raise ValueError(
            f"layout_update: expected an index of {index_size(rows, lists, capacity)} elements for {rows} "
            f"block rows, {lists} column lists and capacity {capacity}, got shape {list(index.shape)}"
        )


@implement("layout_update")
def _layout_update(
    mask: Tensor, slot_of_block: Tensor, index: Tensor, capacity: int, conv: list[int] | None, release: bool
) -> None:
    geometry = None if conv is None else ConvGeometry(*conv)
    _check(mask, slot_of_block, index, capacity, geometry)
    backend = select(Problem("layout_update", torch.int32), mask.device)
    backend.layout_update(mask, slot_of_block, index, capacity, geometry, release)
    # Kernels write through raw pointers; autograd must see that a graph saved an older index.
    torch.autograd.graph.increment_version((mask, slot_of_block, index))


@fake("layout_update")
def _(mask, slot_of_block, index, capacity, conv, release):  # type: ignore[no-untyped-def]
    return None
