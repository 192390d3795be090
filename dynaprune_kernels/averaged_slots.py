"""Slots that somebody averaged with everything else in a state dict: told from averages of different ones."""

from __future__ import annotations

import torch
from torch import Tensor

# How far rounding takes a long average of equal numbers in float32: 6e-4 of them with a decay of 0.9999.
_ROUNDING = 1e-3


def whole_slots(slots: Tensor, values: Tensor, mine: Tensor, capacity: int) -> Tensor:
    """The slots that a state dict means: an average of equal slots is rounded, or cut to integers.

    Args:
        slots: ``slot_of_block`` as it was found, of any dtype.
        values: ``[slots, bi, bo]``, found beside it.
        mine: int32 ``[rows, columns]``, the slots of the layout that loads.
        capacity: of that layout.

    Returns:
        int32 ``[rows, columns]`` for ``BlockLayout.restore_``; what is no average comes back as it is.

    Raises:
        ValueError: averages of different slots.
    """
    mine = mine.to(slots.device)
    comparable = slots.shape == mine.shape and values.shape[0] == capacity
    if slots.is_floating_point():
        if comparable and bool(((slots - mine).abs() <= _ROUNDING * mine.abs().clamp(min=1)).all()):
            return mine.clone()
        whole = slots.round()
        if not bool(((slots - whole).abs() <= _ROUNDING).all()):
            raise ValueError(
                "expected the slots of one structure, got averages of different ones: the values that came "
                "with them mix blocks. Average floating point values only, in a copy that follows "
                "(pruner.follow)"
            )
        return whole.int()
    if not comparable or slots.dtype != torch.int32 or not bool(((slots - mine).abs() <= 1).all()):
        return slots
    cut = not _are_slots_of(slots, values) and _are_slots_of(mine, values)
    return mine.clone() if cut else slots


def _are_slots_of(slots: Tensor, values: Tensor) -> bool:
    """Whether each slot is one of ``values`` and there once, and the others hold zeros."""
    used = slots[slots != -1].long()
    outside = (used < 0) | (used >= values.shape[0])
    if bool(outside.any()) or used.unique().numel() != used.numel():
        return False
    free = torch.ones(values.shape[0], dtype=torch.bool, device=used.device)
    free[used] = False
    return not bool(values.detach()[free.to(values.device)].any())
