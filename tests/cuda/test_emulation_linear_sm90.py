"""Hopper's linear kernels on host threads: boxes, swizzles, phases, descriptors and items."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.cuda.emulation import CHOSEN, as_float64
from tests.cuda.linear_cases import Array, Case, Operands, assert_close, by_block, by_slot, operands

pytestmark = pytest.mark.gpu_offline

Emulated = Callable[[str], ModuleType]

# Ragged on every side; lists longer than the ring of stages; empty rows and columns; suspended, free slots.
PRODUCTS = {  # and the number of multiprocessors: few get wide tiles and several each, many get narrow ones
    "long lists": (Case(130, 144, 528, (64, 64), "live", "bfloat16"), 1),
    "several wide tiles": (Case(300, 200, 200, (64, 64), "random", "float16"), 1),
    "large blocks": (Case(140, 300, 400, (128, 128), "cross", "bfloat16"), 1),
    "high blocks": (Case(50, 250, 130, (128, 64), "suspended", "float16"), 3),
    "low blocks": (Case(70, 130, 250, (64, 128), "random", "bfloat16"), 9),
    "nothing lives": (Case(65, 128, 128, (128, 128), "dead", "float16"), 2),
    "one token": (Case(1, 8, 24, (64, 64), "live", "bfloat16"), 132),
}
GRADIENTS = {  # and whether the sum over tokens is split
    "more blocks than fit": (Case(130, 144, 528, (64, 64), "live", "bfloat16"), 1, False),
    "large blocks": (Case(200, 200, 200, (128, 128), "random", "float16"), 1, False),
    "split, suspended blocks": (Case(700, 64, 200, (64, 64), "suspended", "float16"), 4, True),
    "split, high blocks": (Case(1100, 130, 130, (128, 64), "cross", "bfloat16"), 2, True),
    "low blocks": (Case(100, 130, 250, (64, 128), "random", "bfloat16"), 2, False),
    "nothing lives": (Case(65, 128, 128, (128, 128), "dead", "float16"), 2, False),
}


def layer(o: Operands) -> tuple[Array, int, int]:
    """What every launcher is told about the layer."""
    return o.index, o.case.inputs, o.case.out


def wgrad(module: ModuleType, o: Operands, values: Array | None, processors: int) -> tuple[Any, ...]:
    bo, bi = o.case.block
    index, inputs, out = layer(o)
    return module.wgrad(o.dy, o.x, values, index, o.capacity, bi, bo, inputs, out, processors)


@pytest.mark.parametrize("name", PRODUCTS)
def test_forward(emulated: Emulated, name: str) -> None:
    case, processors = PRODUCTS[name]
    o = operands(case)
    y = emulated("linear_sm90").forward(o.x, o.values, o.bias, *layer(o), processors)
    exact = o.exact_x @ o.exact_weight.T + o.exact_bias
    magnitude = np.abs(o.exact_x) @ np.abs(o.exact_weight).T + np.abs(o.exact_bias)
    assert_close("y", o, y, exact, magnitude)


@pytest.mark.parametrize("name", PRODUCTS)
def test_dgrad(emulated: Emulated, name: str) -> None:
    case, processors = PRODUCTS[name]
    o = operands(case)
    dx = emulated("linear_sm90").dgrad(o.dy, o.values, *layer(o), processors)
    magnitude = np.abs(o.exact_dy) @ np.abs(o.exact_weight)
    assert_close("dx", o, dx, o.exact_dy @ o.exact_weight, magnitude)


@pytest.mark.parametrize("name", GRADIENTS)
def test_wgrad(emulated: Emulated, name: str) -> None:
    case, processors, split = GRADIENTS[name]
    module, o = emulated("linear_sm90"), operands(case)
    exact, magnitude = o.exact_dy.T @ o.exact_x, np.abs(o.exact_dy).T @ np.abs(o.exact_x)
    dvalues, nothing, was_split = wgrad(module, o, None, processors)
    assert nothing is None
    assert was_split == split
    assert_close("dvalues", o, dvalues, by_slot(exact, o), by_slot(magnitude, o))
    written = as_float64(dvalues)
    assert (written[by_slot(np.ones_like(exact), o) == 0] == 0).all()  # padding, unlisted slots

    again, wg, _ = wgrad(module, o, o.values, processors)
    assert np.array_equal(dvalues, again)
    sums = (by_block(exact, o) * by_block(o.exact_weight, o)).sum((2, 3)) * o.mask
    magnitude = (by_block(magnitude, o) * by_block(np.abs(o.exact_weight), o)).sum((2, 3)) * o.mask
    assert_close("wg", o, wg, sums, magnitude)


def test_padding_of_gradients_is_zero_whatever_dy_holds(emulated: Emulated) -> None:
    o = operands(Case(64, 70, 70, (64, 64), "live", "bfloat16"))
    o.dy[3, 1] = 0x7F80  # infinity: times the zeros beyond x it is NaN
    dvalues, _, _ = wgrad(emulated("linear_sm90"), o, None, 1)
    padding = by_slot(np.ones((70, 70)), o) == 0
    assert (as_float64(dvalues)[padding] == 0).all()


def test_results_do_not_depend_on_the_number_of_multiprocessors(emulated: Emulated) -> None:
    module, o = emulated("linear_sm90"), operands(Case(200, 300, 300, (64, 64), "random", "float16"))
    few, many = (module.forward(o.x, o.values, None, *layer(o), processors) for processors in (1, 3))
    assert np.array_equal(few, many)


@pytest.mark.parametrize("block", [(32, 64), (64, 16)])
def test_smaller_blocks_are_left_to_other_kernels(emulated: Emulated, block: tuple[int, int]) -> None:
    o = operands(Case(16, 64, 64, block, "live", "float16"))
    with pytest.raises(ValueError, match="not for sm_90a"):
        emulated("linear_sm90").forward(o.x, o.values, None, *layer(o), 1)


@pytest.mark.skipif(CHOSEN in os.environ, reason="sanitizers would report what is wrong on purpose")
@pytest.mark.parametrize("kind", ["mbarrier_wait", "wait_products"])
def test_a_wait_left_out_is_noticed(emulated: Emulated, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    case, _ = PRODUCTS["several wide tiles"]
    module, o = emulated("linear_sm90"), operands(case)
    exact = module.forward(o.x, o.values, None, *layer(o), 1)
    # For the first item's description, or for the last products of that item, whose list is longest.
    number = 1 if kind == "mbarrier_wait" else o.mask.sum(1).max() + 1
    monkeypatch.setenv("DYN_EMULATION_WITHOUT", f"{kind}:{number}")

    def noticed() -> bool:
        try:
            return not np.array_equal(exact, module.forward(o.x, o.values, None, *layer(o), 1))
        except (RuntimeError, ValueError):  # a deadlock, copies that nobody waited for
            return True

    # A thread that does not wait may still come late enough.
    assert any(noticed() for _ in range(40))
