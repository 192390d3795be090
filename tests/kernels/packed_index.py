"""The packed index in plain Python, from its definition: what ``layout_update`` is checked with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def packed_index(
    mask: np.ndarray,
    slot_of_block: np.ndarray,
    capacity: int,
    *,
    overflow: int = 0,
    groups: int = 1,
    kernel: Sequence[int] = (1, 1),
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
) -> np.ndarray:
    """Index (int32) of the blocks with ``mask`` and a slot; both arrays are ``[rows, columns]``."""
    rows, columns = mask.shape
    channel_blocks = columns // (kernel[0] * kernel[1])
    phases = stride[0] * stride[1]
    row_lists: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    col_lists: list[list[tuple[int, int, int, int]]] = [[] for _ in range(groups * channel_blocks * phases)]
    block_of_slot = np.full(capacity, -1)
    for row in range(rows):
        for column in range(columns):
            slot = int(slot_of_block[row, column])
            if slot >= 0:
                block_of_slot[slot] = row * columns + column
            if slot < 0 or not mask[row, column]:
                continue
            tap, channel = divmod(column, channel_blocks)
            r, s = divmod(tap, kernel[1])
            phase = (r * dilation[0]) % stride[0] * stride[1] + (s * dilation[1]) % stride[1]
            group = row // (rows // groups)
            row_lists[row].append((column, slot))
            col_lists[(group * channel_blocks + channel) * phases + phase].append((tap, row, column, slot))

    def pointer(lists: Sequence[Sequence[object]]) -> list[int]:
        return [0, *np.cumsum([len(entries) for entries in lists]).tolist()]

    def filled(entries: list[int]) -> list[int]:
        return entries + [-1] * (capacity - len(entries))

    def longest_first(lists: Sequence[Sequence[object]]) -> list[int]:
        return sorted(range(len(lists)), key=lambda k: (-len(lists[k]), k))

    by_row = [entry for entries in row_lists for entry in sorted(entries)]
    by_col = [entry for entries in col_lists for entry in sorted(entries)]
    parts = [
        [len(by_row), overflow, int((block_of_slot >= 0).sum()), 0, 0, 0, 0, 0],
        block_of_slot.tolist(),
        pointer(row_lists),
        filled([column for column, _ in by_row]),
        filled([slot for _, slot in by_row]),
        pointer(col_lists),
        filled([row for _, row, _, _ in by_col]),
        filled([column for _, _, column, _ in by_col]),
        filled([slot for *_, slot in by_col]),
        longest_first(row_lists),
        longest_first(col_lists),
    ]
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]).astype(np.int32)


def updated_slots(
    mask: np.ndarray, slot_of_block: np.ndarray, capacity: int, release: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """What ``layout_update`` makes of mask and slots, and how many blocks it had to drop."""
    mask, slots, dropped = mask.copy(), slot_of_block.copy(), 0
    if release:
        slots[~mask] = -1
    free = [slot for slot in range(capacity) if slot not in set(slots[slots >= 0].tolist())]
    for row, column in np.argwhere(mask & (slots < 0)):
        if free:
            slots[row, column] = free.pop(0)
        else:
            mask[row, column] = False
            dropped += 1
    return mask, slots, dropped
