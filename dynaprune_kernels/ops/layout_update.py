"""``layout_update``: a new live mask into slots and index lists, in place and on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels.backends.dispatch import select
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.geometry import ConvGeometry
from dynaprune_kernels.ops.registration import define, fake, implement

define(
    "layout_update(Tensor(a!) mask, Tensor(b!) slot_of_block, Tensor(c!) index, SymInt capacity, "
    "int[]? conv, bool release) -> ()"
)


@implement("layout_update")
def _layout_update(
    mask: Tensor, slot_of_block: Tensor, index: Tensor, capacity: int, conv: list[int] | None, release: bool
) -> None:
    backend = select(Problem("layout_update", torch.int32), mask.device)
    geometry = None if conv is None else ConvGeometry(*conv)
    backend.layout_update(mask, slot_of_block, index, capacity, geometry, release)
    # Kernels write through raw pointers; autograd must see that a graph saved an older index.
    torch.autograd.graph.increment_version((mask, slot_of_block, index))


@fake("layout_update")
def _(mask, slot_of_block, index, capacity, conv, release):  # type: ignore[no-untyped-def]
    return None
