"""The backend `cuda` from Python to the last kernel, on CPU tensors: its bindings over emulated kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dynaprune_kernels import ConvGeometry
from dynaprune_kernels.backends import cuda
from tests.cuda import tensors
from tests.triton.parity import (
    Case,
    check_gradients,
    check_layout,
    check_products,
    check_saliency,
    operands,
)

pytestmark = [pytest.mark.gpu_offline, pytest.mark.slow]

HALF, BFLOAT16 = torch.float16, torch.bfloat16
LINEAR = [
    Case(40, 70, (16, 32), "random", 37),
    Case(130, 100, (64, 32), "cross", 1, HALF),
    Case(96, 64, (32, 16), "suspended", 33, BFLOAT16),
    Case(50, 50, (32, 64), "dead", 4),
    Case(16, 16, (16, 16), "live", 0),
]
CONV = [
    Case(40, 36, (16, 16), "random", 2, conv=ConvGeometry(3, 3, 2, 2, 1, 1), size=(7, 9)),
    Case(64, 40, (32, 16), "random", 1, HALF, ConvGeometry(3, 2, 1, 2, 1, 0, 2, 1, 2), (6, 5)),
    Case(24, 40, (16, 32), "one", 2, BFLOAT16, ConvGeometry(1, 1), (3, 2)),
    Case(32, 16, (16, 16), "random", 0, conv=ConvGeometry(3, 3, 1, 1, 1, 1), size=(3, 3)),
]
HOPPER = [
    Case(130, 200, (64, 64), "random", 70, BFLOAT16),
    Case(128, 256, (128, 128), "suspended", 9, HALF),
    Case(100, 72, (64, 64), "random", 2, BFLOAT16, ConvGeometry(3, 3, 2, 2, 1, 1), (5, 4)),
    Case(128, 128, (64, 64), "cross", 1, HALF, ConvGeometry(1, 2, 1, 1, 0, 1, 1, 1, 2), (3, 4)),
    Case(128, 96, (64, 64), "random", 1, HALF, ConvGeometry(2, 1, groups=2), (3, 4)),  # runs as on 8.0
]
CHECKS = [check_products, check_gradients, check_saliency]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's raw ops are those over emulated kernels, on a GPU of capability 8.0, without TF32."""
    monkeypatch.setattr(cuda, "_raw", tensors.load)
    monkeypatch.setattr(cuda, "tf32_allowed", lambda *, conv: False)
    monkeypatch.setenv("DYN_EMULATION_CAPABILITY", "80")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", LINEAR + CONV, ids=str)
def test_matches_the_reference(case: Case, check: Callable[..., None]) -> None:
    check(case, "cpu", kernels=cuda)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("check", CHECKS[:2], ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_matches_the_reference_on_hopper(
    case: Case, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_EMULATION_CAPABILITY", "90")
    check(case, "cpu", kernels=cuda)


@pytest.mark.parametrize("case", [LINEAR[0], CONV[0]], ids=str)
def test_tf32_where_torch_may_use_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "tf32_allowed", lambda *, conv: conv == (case.conv is not None))
    check_products(case, "cpu", "tf32", cuda)
    with pytest.raises(AssertionError, match="off by"):
        check_products(case, "cpu", "float32", cuda)


@pytest.mark.parametrize("case", [LINEAR[0], LINEAR[2], *CONV[:2]], ids=str)
def test_layout_update_is_bitwise_the_reference(case: Case) -> None:
    check_layout(case, "cpu", kernels=cuda)


def wrong_calls() -> list[tuple[str, str, list[object]]]:
    """A raw op, what its message must say, and arguments."""
    layout, x, values, _, bias, dy = operands(Case(40, 64, (16, 32), "live", 4), "cpu")
    dy = torch.nn.functional.pad(dy, (0, 8))
    index, capacity = layout.index, layout.capacity
    sizes, flag = [64, 40, False], torch.tensor(1.0)
    block = [index, capacity, 32, 16]
    image, blocks = torch.zeros(1, 5, 5, 16), torch.zeros(1, 16, 16)
    conv = [3, 3, 1, 1, 1, 1, 1, 1, 1]
    large = [9, *conv[1:]]
    update = [layout.slot_of_block, index, capacity, 1, [1, 1], [1, 1], [1, 1], True]
    return [
        ("linear_forward", "x of width 64 .64 in whole 16s", [x[:, :63], values, bias, index, *sizes]),
        ("linear_forward", "rows of x at multiples", [x.t().contiguous().t(), values, bias, index, *sizes]),
        ("linear_forward", "values of the dtype of x", [x, values.half(), bias, index, *sizes]),
        ("linear_forward", r"expected bias \[40\]", [x, values, bias[1:], index, *sizes]),
        ("linear_forward", "an index of .* elements for 3", [x, values, bias, index[1:], *sizes]),
        ("linear_forward", "float16 or bfloat16", [x.double(), values.double(), None, index, *sizes]),
        ("linear_dgrad", "expected contiguous values", [dy, values.transpose(1, 2), index, *sizes]),
        ("linear_wgrad", "64 or 128, got 0 x 16", [dy, x, index, capacity, 0, 16, *sizes]),
        ("linear_wgrad", r"as many rows in dy as in x \(4\)", [dy[1:], x, *block, *sizes]),
        ("linear_probe", "probe as one bool, got Float", [dy, x, *block, 64, 40, flag, False]),
        ("conv2d_forward", "x with 32 channels", [image, blocks, None, index, 20, 16, conv, False]),
        ("conv2d_forward", "expected conv", [image, blocks, None, index, 16, 16, conv[1:], False]),
        ("conv2d_dgrad", "after padding", [image, blocks, index, 16, [1, 16, 5, 5], large, False]),
        ("conv2d_wgrad", "expected dy", [image[:, 1:].clone(), image, index, 1, *4 * [16], conv, False]),
        ("block_saliency", "grad of the shape of values", [values, values[1:], index, 3, 2]),
        ("layout_update", "expected a bool mask", [layout.mask.int(), *update]),
    ]


@pytest.mark.parametrize("number", range(16))
def test_wrong_input_says_what_was_expected(number: int) -> None:
    op, message, arguments = wrong_calls()[number]
    with pytest.raises(RuntimeError, match=message):
        getattr(tensors.load(), op)(*arguments)
