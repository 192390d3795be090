"""Hopper's linear kernels on host threads: TMA boxes and swizzles, mbarrier phases, wgmma descriptors, items."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.cuda.linear_cases import (
    Array,
    Case,
    Operands,
    assert_close,
    by_block,
    by_slot,
    operands,
)
from tests.cuda.rounding import widened

Emulated = Callable[[str], ModuleType]

# Ragged on every side; lists longer than the ring of stages; empty rows and columns; suspended and free slots.
PRODUCTS = [
    (Case(130, 144, 528, (64, 64), "live", "bf16"), 1),  # narrow tiles
    (Case(300, 200, 200, (64, 64), "random", "f16"), 1),  # wide ones
    (Case(140, 300, 400, (128, 128), "cross", "bf16"), 1),
    (Case(50, 250, 130, (128, 64), "suspended", "f16"), 3),
    (Case(70, 130, 250, (64, 128), "random", "bf16"), 2),
    (Case(65, 128, 128, (128, 128), "dead", "f16"), 2),
    (Case(1, 8, 24, (64, 64), "live", "bf16"), 132),
]


def forward(module: ModuleType, o: Operands, sm_count: int, bias: Array | None) -> Array:
    return module.forward(o.x, o.values, bias, o.index, o.shape(o.x), o.blocks, sm_count)


def dgrad(module: ModuleType, o: Operands, sm_count: int) -> Array:
    return module.dgrad(o.dy, o.values, o.index, o.shape(o.dy), o.blocks, sm_count)


def wgrad(module: ModuleType, o: Operands, sm_count: int, values: Array | None) -> tuple[Any, ...]:
    return module.wgrad(o.dy, o.x, values, o.index, o.shape(o.x, o.dy), o.blocks, sm_count)


@pytest.mark.parametrize(("case", "sm_count"), PRODUCTS, ids=str)
def test_forward(emulated: Emulated, case: Case, sm_count: int) -> None:
    module, o = emulated("linear_sm90"), operands(case)
    y = forward(module, o, sm_count, o.bias)
    exact = o.exact_x @ o.exact_weight.T + o.exact_bias
    magnitude = np.abs(o.exact_x) @ np.abs(o.exact_weight).T + np.abs(o.exact_bias)
    assert_close("y", o, y, exact, magnitude, case.dtype)


@pytest.mark.parametrize(("case", "sm_count"), PRODUCTS, ids=str)
def test_dgrad(emulated: Emulated, case: Case, sm_count: int) -> None:
    module, o = emulated("linear_sm90"), operands(case)
    dx = dgrad(module, o, sm_count)
    magnitude = np.abs(o.exact_dy) @ np.abs(o.exact_weight)
    assert_close("dx", o, dx, o.exact_dy @ o.exact_weight, magnitude, case.dtype)


def check_wgrad(module: ModuleType, case: Case, sm_count: int, split: bool) -> None:
    o = operands(case)
    exact, magnitude = o.exact_dy.T @ o.exact_x, np.abs(o.exact_dy).T @ np.abs(o.exact_x)
    dvalues, nothing, workspace = wgrad(module, o, sm_count, None)
    assert nothing is None
    assert (workspace > 0) == split
    assert_close("dvalues", o, dvalues, by_slot(exact, o), by_slot(magnitude, o), case.dtype)

    again, wg, _ = wgrad(module, o, sm_count, o.values)
    assert np.array_equal(dvalues, again)
    sums = (by_block(exact, o) * by_block(o.exact_weight, o)).sum((2, 3)) * o.mask
    magnitude = (by_block(magnitude, o) * by_block(np.abs(o.exact_weight), o)).sum((2, 3)) * o.mask
    assert_close("wg", o, wg, sums, magnitude, "f32")
    listed = widened(dvalues, case.dtype)[o.slots[o.mask]]
    assert (np.delete(widened(dvalues, case.dtype), o.slots[o.mask], axis=0) == 0).all()
    padding = by_slot(np.ones_like(exact), o)[o.slots[o.mask]] == 0
    assert (listed[padding] == 0).all()


@pytest.mark.parametrize(
    ("case", "sm_count", "split"),
    [
        (Case(130, 144, 528, (64, 64), "live", "bf16"), 1, False),  # chunks of 4 blocks, and what is left over
        (Case(200, 200, 200, (128, 128), "random", "f16"), 1, False),
        (Case(700, 64, 200, (64, 64), "suspended", "f16"), 4, True),
        (Case(1100, 130, 130, (128, 64), "cross", "bf16"), 2, True),
        (Case(100, 130, 250, (64, 128), "random", "bf16"), 2, False),
        (Case(65, 128, 128, (128, 128), "dead", "f16"), 2, False),
    ],
    ids=str,
)
def test_wgrad(emulated: Emulated, case: Case, sm_count: int, split: bool) -> None:
    check_wgrad(emulated("linear_sm90"), case, sm_count, split)


def test_padding_of_gradients_is_zero_whatever_dy_holds(emulated: Emulated) -> None:
    case = Case(64, 70, 70, (64, 64), "live", "bf16")
    o = operands(case)
    o.dy[3, 1] = 0x7F80  # infinity: times the zeros beyond x it is NaN
    dvalues, _, _ = wgrad(emulated("linear_sm90"), o, 1, None)
    padding = by_slot(np.ones((70, 70)), o) == 0
    assert (widened(dvalues, "bf16")[padding] == 0).all()


def test_forward_without_bias_is_the_same_on_any_number_of_multiprocessors(emulated: Emulated) -> None:
    module, o = emulated("linear_sm90"), operands(Case(200, 300, 300, (64, 64), "random", "f16"))
    few, many = (forward(module, o, sm_count, None) for sm_count in (1, 3))
    assert np.array_equal(few, many)


@pytest.mark.parametrize("block", [(32, 64), (64, 16)])
def test_smaller_blocks_are_left_to_other_kernels(emulated: Emulated, block: tuple[int, int]) -> None:
    o = operands(Case(16, 64, 64, block, "live", "f16"))
    with pytest.raises(ValueError, match="not for sm_90a"):
        forward(emulated("linear_sm90"), o, 1, None)
