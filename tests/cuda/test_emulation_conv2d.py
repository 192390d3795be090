"""The convolution kernels on host threads, launched as on a device, against sums in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.cuda import conv2d_cases as exact
from tests.cuda.conv2d_cases import Case, Operands, operands
from tests.cuda.linear_cases import assert_close

pytestmark = pytest.mark.gpu_offline

Emulated = Callable[[str], ModuleType]

CASES = [
    Case(2, 40, 36, (7, 9), (16, 16)),
    Case(2, 40, 36, (7, 9), (16, 32), stride=(2, 2), dtype="bfloat16", processors=132),
    Case(1, 40, 36, (5, 6), (32, 16), stride=(2, 2), dtype="float32"),
    Case(1, 40, 36, (5, 6), (64, 64), dtype="float32", precision="tf32"),
    # Groups of 20 channels, everything different in the two directions.
    Case(1, 64, 40, (6, 5), (32, 16), (3, 2), (1, 2), (1, 0), (2, 1), groups=2),
    Case(1, 64, 40, (5, 6), (16, 32), (2, 3), (2, 1), (0, 1), (1, 2), groups=2, dtype="float32"),
    # Taps of one phase in a kernel dilated by the stride, and phases without any tap.
    Case(1, 16, 16, (7, 7), (16, 16), stride=(2, 2), padding=(2, 2), dilation=(2, 2), mask="live"),
    # Strides beyond the kernel: pixels that nothing reads. Empty rows and lists.
    Case(1, 32, 64, (4, 9), (16, 64), (1, 3), (3, 1), (0, 1), mask="cross", dtype="bfloat16"),
    Case(1, 64, 32, (6, 7), (64, 32), (2, 2), (3, 3), (0, 0), mask="live"),
    # Phases without any pixel.
    Case(1, 16, 16, (2, 3), (16, 16), stride=(4, 4), padding=(1, 1), mask="live"),
    Case(3, 24, 20, (5, 4), (16, 32), padding=(2, 2), dilation=(2, 2), mask="suspended"),
    Case(1, 24, 20, (7, 7), (32, 64), (7, 7), (2, 2), (3, 3)),
    # More padding than the kernel reaches: output pixels that see nothing.
    Case(1, 16, 16, (3, 3), (16, 16), (1, 1), (1, 1), (2, 2), mask="live"),
    Case(1, 32, 16, (3, 3), (16, 16), mask="dead"),
    Case(2, 24, 40, (3, 2), (16, 32), (1, 1), (2, 2), (0, 0), mask="one", dtype="bfloat16"),
    Case(2, 24, 40, (3, 2), (16, 32), (1, 1), (1, 1), (0, 0)),  # pointwise
    Case(1, 130, 136, (2, 7), (128, 128), (1, 3), padding=(0, 1)),
    Case(1, 130, 136, (3, 2), (128, 128), (1, 1), (2, 1), (0, 0), mask="cross", dtype="float32"),
    # Several tiles of pixels; then sums over pixels in two parts.
    Case(2, 24, 16, (13, 11), (16, 16), (3, 1), padding=(1, 0)),
    Case(2, 24, 16, (17, 17), (32, 16), (1, 2), (1, 1), (0, 0), mask="one", dtype="bfloat16", processors=132),
    Case(0, 32, 16, (3, 3), (16, 16)),
]


def emulation_of(emulated: Emulated, o: Operands) -> Any:
    case = o.case
    tf32 = case.precision == "tf32"
    return emulated("conv2d").Conv2d(case.shape, o.index, o.grid, tf32, case.processors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(emulated: Emulated, case: Case) -> None:
    o = operands(case)
    conv = emulation_of(emulated, o)
    x, dy, weight, bias = o.exact_x, o.exact_dy, o.exact_weight, o.exact_bias
    for b, b_exact in [(o.bias, bias), (None, np.zeros_like(bias))]:
        y = exact.forward(case, x, weight, b_exact)
        size = exact.forward(case, abs(x), abs(weight), abs(b_exact))
        assert_close("forward", o, conv.forward(o.x, o.values, b), y, size)
    dx, size = exact.dgrad(case, dy, weight), exact.dgrad(case, abs(dy), abs(weight))
    assert_close("dgrad", o, conv.dgrad(o.dy, o.values), dx, size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_blocks(emulated: Emulated, case: Case) -> None:
    o = operands(case)
    conv = emulation_of(emulated, o)
    weight = exact.by_block(case, o.exact_weight)
    dw = exact.by_block(case, exact.wgrad(case, o.exact_dy, o.exact_x))
    size = exact.by_block(case, exact.wgrad(case, abs(o.exact_dy), abs(o.exact_x)))
    dvalues, _ = conv.wgrad(o.dy, o.x, None)
    assert_close("wgrad", o, dvalues, exact.by_slot(o, dw), exact.by_slot(o, size))
    same, wg = conv.wgrad(o.dy, o.x, o.values)
    assert same.tobytes() == dvalues.tobytes(), "wgrad differs with the saliency epilogue"
    sums, bound = (weight * dw).sum((2, 3)), (abs(weight) * size).sum((2, 3))
    assert_close("saliency", o, wg, sums, bound)

    squares = np.where(o.mask, 0.0, (dw * dw).sum((2, 3)))
    sizes = np.where(o.mask, 0.0, (size * size).sum((2, 3)))
    # |g^2 - (g + d)^2| <= 2 |g| d + d^2, summed over a block by Cauchy-Schwarz.
    bound = 2 * np.sqrt(squares * sizes) + squares
    assert_close("probe", o, conv.probe(o.dy, o.x, True), squares, bound)
    assert not conv.probe(o.dy, o.x, False).any(), "the probe ran while its flag was down"


def test_sums_in_parts_are_tested(emulated: Emulated) -> None:
    case = next(case for case in CASES if case.size == (17, 17))
    o = operands(case)
    bo, bi = case.block
    assert emulation_of(emulated, o).workspace(o.x) == 2 * o.capacity * bi * bo * 4


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[-2]], ids=str)
def test_same_results_in_any_order_of_thread_blocks(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    o = operands(case)
    conv = emulation_of(emulated, o)
    results = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("DYN_EMULATION_BLOCK_ORDER", order)
        arrays = [conv.forward(o.x, o.values, o.bias), conv.dgrad(o.dy, o.values)]
        arrays += conv.wgrad(o.dy, o.x, o.values)
        results.append([array.tobytes() for array in arrays])
    assert results[0] == results[1]
