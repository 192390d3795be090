"""The layout kernels on host threads: every number of the index, after each of a row of updates."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from tests.kernels.packed_index import packed_index, updated_slots

pytestmark = pytest.mark.gpu_offline

Emulated = Callable[[str], ModuleType]


class Grid(NamedTuple):
    """A weight's blocks; ``columns`` are the taps' channel blocks, one tap after the other."""

    rows: int
    columns: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def lists(self) -> int:
        taps, phases = np.prod(self.kernel), np.prod(self.stride)
        return int(self.groups * (self.columns // taps) * phases)


GRIDS = {
    "one block": Grid(1, 1),
    "no columns": Grid(3, 0),
    "linear": Grid(6, 5),
    "more rows than warps": Grid(37, 3),
    "more columns than lanes": Grid(3, 70),
    "several chunks of slots": Grid(20, 33),
    "conv 3x3": Grid(4, 9 * 3, kernel=(3, 3)),
    "conv stride 2": Grid(5, 9 * 2, kernel=(3, 3), stride=(2, 2)),
    "conv phases without taps": Grid(3, 2, stride=(2, 3)),
    "conv dilated": Grid(3, 20 * 2, kernel=(5, 4), stride=(3, 2), dilation=(2, 1)),
    "conv groups": Grid(6, 9 * 2, groups=3, kernel=(3, 3), stride=(2, 1)),
    "conv wide": Grid(4, 3 * 34, groups=2, kernel=(1, 3), stride=(1, 2)),
}


class Layout:
    """Mask, slots and index as the kernels leave them, checked with plain Python after each update."""

    def __init__(self, module: ModuleType, grid: Grid, capacity: int) -> None:
        self.module, self.grid, self.capacity = module, grid, capacity
        self.mask = np.zeros((grid.rows, grid.columns), dtype=bool)
        self.slots = np.full(self.mask.shape, -1, dtype=np.int32)

    def update(self, mask: np.ndarray, release: bool) -> int:
        """Make ``mask`` live; how many blocks found no slot."""
        grid = self.grid
        expected_mask, expected_slots, dropped = updated_slots(mask, self.slots, self.capacity, release)
        expected = packed_index(
            expected_mask,
            expected_slots,
            self.capacity,
            overflow=dropped,
            groups=grid.groups,
            kernel=grid.kernel,
            stride=grid.stride,
            dilation=grid.dilation,
        )
        index = np.full_like(expected, 123456789)
        self.mask[:] = mask
        conv = (grid.groups, *grid.kernel, *grid.stride, *grid.dilation)
        self.module.layout_update(self.mask, self.slots, index, self.capacity, conv, release)
        np.testing.assert_array_equal(self.mask, expected_mask)
        np.testing.assert_array_equal(self.slots, expected_slots)
        np.testing.assert_array_equal(index, expected)
        return dropped


@pytest.mark.parametrize("name", GRIDS)
def test_updates(emulated: Emulated, name: str) -> None:
    grid, random = GRIDS[name], np.random.default_rng(0)
    blocks = grid.rows * grid.columns
    layout = Layout(emulated("layout_update"), grid, max(1, blocks * 2 // 3))

    def draw(density: float) -> np.ndarray:
        return random.random((grid.rows, grid.columns)) < density

    layout.update(draw(0.5), True)
    layout.update(draw(0.5) & layout.mask, False)  # suspended blocks keep their slots
    layout.update(draw(0.6), False)  # new blocks beside suspended ones
    layout.update(draw(0.4), True)
    dropped = layout.update(np.ones((grid.rows, grid.columns), dtype=bool), True)  # more than there are slots
    assert dropped == max(0, blocks - layout.capacity)
    layout.update(np.zeros((grid.rows, grid.columns), dtype=bool), False)
    layout.update(np.zeros((grid.rows, grid.columns), dtype=bool), True)
    layout.update(draw(0.1), True)


def test_blocks_in_reverse_order(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_EMULATION_BLOCK_ORDER", "reverse")
    test_updates(emulated, "several chunks of slots")
