"""Hopper's convolution kernels on host threads: bounding boxes, shifts, phases, groups, ragged ends."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.cuda import conv2d_cases as exact
from tests.cuda.conv2d_cases import Case, Operands, operands
from tests.cuda.emulation import as_dtype, as_float64
from tests.cuda.linear_cases import assert_close

pytestmark = pytest.mark.gpu_offline

Emulated = Callable[[str], ModuleType]

BF16, F16 = "bfloat16", "float16"
# One processor gets wide tiles, many get narrow ones.
CASES = {
    "several wide tiles": Case(2, 64, 64, (15, 11), (64, 64), dtype=BF16),
    "several narrow tiles": Case(3, 64, 64, (9, 7), (64, 64), dtype=F16, processors=132),
    "high blocks, stride": Case(2, 128, 64, (9, 7), (128, 64), stride=(2, 2), dtype=BF16, processors=132),
    "low blocks, dilation": Case(
        1, 64, 128, (9, 8), (64, 128), padding=(2, 2), dilation=(2, 2), dtype=F16, processors=132
    ),
    "ragged, asymmetric": Case(
        1, 130, 136, (6, 11), (128, 128), (3, 2), (1, 2), (0, 2), (1, 3), mask="suspended", dtype=BF16
    ),
    "ragged, odd channels": Case(1, 39, 75, (5, 6), (64, 64), (2, 3), (2, 1), dtype=F16),
    "groups": Case(1, 128, 128, (6, 5), (64, 64), groups=2, dtype=BF16),
    "groups of large blocks": Case(
        1, 256, 256, (3, 4), (128, 128), (1, 2), (1, 2), (0, 1), groups=2, mask="cross", dtype=F16
    ),
    "pixels that no tap sees": Case(2, 64, 64, (5, 6), (64, 64), (1, 1), (2, 2), (0, 0), dtype=BF16),
    "strides beyond the kernel": Case(
        1, 64, 64, (4, 10), (64, 64), (1, 2), (1, 4), (0, 1), mask="live", dtype=F16, processors=9
    ),
    "phases without pixels": Case(2, 64, 64, (1, 3), (64, 64), stride=(2, 2), mask="live", dtype=BF16),
    "outputs that see nothing": Case(
        1, 64, 16, (3, 3), (64, 64), (1, 1), (1, 1), (2, 2), mask="live", dtype=F16
    ),
    "empty rows": Case(1, 128, 128, (3, 4), (64, 64), (2, 1), mask="cross", dtype=BF16, processors=132),
    "nothing lives": Case(1, 64, 128, (3, 5), (64, 64), mask="dead", dtype=F16),
    "split sums": Case(2, 64, 70, (15, 17), (64, 64), (1, 2), mask="one", dtype=BF16, processors=4),
}


def emulation_of(emulated: Emulated, o: Operands) -> Any:
    return emulated("conv2d_sm90").Conv2d(o.case.shape, o.index, o.grid, o.case.processors)


@pytest.mark.parametrize("name", CASES)
def test_products(emulated: Emulated, name: str) -> None:
    case, o = CASES[name], operands(CASES[name])
    conv, x, dy, weight, bias = emulation_of(emulated, o), o.exact_x, o.exact_dy, o.exact_weight, o.exact_bias
    y, size = exact.forward(case, x, weight, bias), exact.forward(case, abs(x), abs(weight), abs(bias))
    assert_close("forward", o, conv.forward(o.x, o.values, o.bias), y, size)
    dx, size = exact.dgrad(case, dy, weight), exact.dgrad(case, abs(dy), abs(weight))
    assert_close("dgrad", o, conv.dgrad(o.dy, o.values), dx, size)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_blocks(emulated: Emulated, name: str) -> None:
    case, o = CASES[name], operands(CASES[name])
    conv, weight = emulation_of(emulated, o), exact.by_block(case, o.exact_weight)
    dw = exact.by_block(case, exact.wgrad(case, o.exact_dy, o.exact_x))
    size = exact.by_block(case, exact.wgrad(case, abs(o.exact_dy), abs(o.exact_x)))
    dvalues, wg, split = conv.wgrad(o.dy, o.x, o.values)
    assert split == (name == "split sums")
    assert_close("wgrad", o, dvalues, exact.by_slot(o, dw), exact.by_slot(o, size))
    sums, bound = (weight * dw).sum((2, 3)), (abs(weight) * size).sum((2, 3))
    assert_close("saliency", o, wg, sums, bound)


@pytest.mark.parametrize("name", ["ragged, odd channels", "split sums"])
def test_gradients_are_the_same_without_saliency(emulated: Emulated, name: str) -> None:
    o = operands(CASES[name])
    conv = emulation_of(emulated, o)
    dvalues, nothing, _ = conv.wgrad(o.dy, o.x, None)
    assert nothing is None
    assert np.array_equal(dvalues, conv.wgrad(o.dy, o.x, o.values)[0])


def test_padding_of_gradients_is_zero_whatever_dy_holds(emulated: Emulated) -> None:
    case = Case(1, 70, 70, (3, 3), (64, 64), (1, 2), mask="live", dtype=BF16)
    o = operands(case)
    o.dy[0, 1, 2, 1] = 0x7F80  # infinity: times the zeros beyond x it is NaN
    dvalues, _, _ = emulation_of(emulated, o).wgrad(o.dy, o.x, None)
    padding = exact.by_slot(o, exact.by_block(case, np.ones_like(o.exact_weight))) == 0
    assert padding.any() and (as_float64(dvalues)[padding] == 0).all()


def test_a_group_does_not_read_another(emulated: Emulated) -> None:
    o = operands(CASES["groups"])
    conv = emulation_of(emulated, o)
    y, dx = conv.forward(o.x, o.values, o.bias), conv.dgrad(o.dy, o.values)
    o.x[..., 64:] = o.dy[..., 64:] = as_dtype(np.array(np.nan), BF16)
    assert np.array_equal(conv.forward(o.x, o.values, o.bias)[..., :64], y[..., :64])
    assert np.array_equal(conv.dgrad(o.dy, o.values)[..., :64], dx[..., :64])


def test_results_do_not_depend_on_the_number_of_multiprocessors(emulated: Emulated) -> None:
    few, many = (
        emulation_of(emulated, operands(CASES["high blocks, stride"]._replace(processors=processors)))
        for processors in (1, 3)
    )
    o = operands(CASES["high blocks, stride"])
    assert np.array_equal(few.forward(o.x, o.values, None), many.forward(o.x, o.values, None))
    assert np.array_equal(few.dgrad(o.dy, o.values), many.dgrad(o.dy, o.values))


WIDE = Case(1, 64, 64, (3, 140), (64, 64), (1, 129), padding=(0, 0), dtype=BF16)


@pytest.mark.parametrize(
    ("runs", "case"),
    [
        (True, WIDE),  # the corner at -128
        (False, WIDE._replace(kernel=(1, 130))),
        (True, WIDE._replace(padding=(0, 128))),
        (False, WIDE._replace(padding=(0, 129))),
        (True, WIDE._replace(kernel=(1, 86), dilation=(1, 3), padding=(0, 127))),  # a shift of 255
        (False, WIDE._replace(kernel=(1, 129), dilation=(1, 2), padding=(0, 128))),  # of 256
        (True, WIDE._replace(kernel=(3, 3), stride=(1, 4))),
        (False, WIDE._replace(kernel=(3, 3), stride=(2, 3))),
        (False, WIDE._replace(dtype="float32")),
        (False, WIDE._replace(block=(32, 64))),
        (False, WIDE._replace(block=(64, 32))),
        (True, WIDE._replace(inputs=256, block=(64, 128), groups=2, out=128)),
        (False, WIDE._replace(inputs=128, block=(64, 128), groups=2, out=128)),  # half a block
        (False, WIDE._replace(inputs=144, groups=2, out=128)),
        (False, WIDE._replace(images=0)),
    ],
    ids=str,
)
def test_what_cannot_run_is_left_to_other_kernels(emulated: Emulated, runs: bool, case: Case) -> None:
    rows, columns = case.grid
    grid = (rows, columns, case.groups * columns // case.taps * case.stride[0] * case.stride[1], 1)
    conv = emulated("conv2d_sm90").Conv2d(case.shape, np.zeros(0, np.int32), (*grid, *case.block[::-1]), 1)
    assert conv.runs(as_dtype(np.zeros(0), case.dtype)) == runs


def test_copies_go_through_the_bounding_box(emulated: Emulated) -> None:
    """Two images of 4 x 4 pixels from pixel (1, 2) on, as Hopper reads them."""
    images = np.arange(1, 33, dtype=np.uint16).reshape(2, 4, 4, 1)
    column = emulated("conv2d_sm90").column
    read = column(images, lower=(-1, -1), upper=(-1, -1), step=(1, 1), at=(1, 2), shift=(0, 0), pixels=16)
    assert read == [7, 0, 9, 10, 11, 0, 0, 0, 0, 0, 17, 18, 19, 0, 21, 22]
    read = column(images, lower=(-1, -1), upper=(-1, -1), step=(2, 2), at=(-1, -1), shift=(1, 2), pixels=6)
    assert read == [2, 4, 10, 12, 18, 20]
