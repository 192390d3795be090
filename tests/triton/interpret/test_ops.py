"""The public functions on the Triton backend: outputs and gradients against the dense masked computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynaprune_kernels import BlockLayout, ConvGeometry, block_sparse_conv2d, block_sparse_linear, reference
from tests.triton.parity import Case, assert_close, operands

pytestmark = pytest.mark.interpret


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAPRUNE_BACKEND", "triton")


def gradients(y: torch.Tensor, dy: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear(dtype: torch.dtype) -> None:
    case = Case(40, 50, (16, 32), "random", 12, dtype)
    layout, x, values, clean, bias, dy = operands(case, "cpu")
    tap = torch.zeros(2, layout.blocks, requires_grad=True)
    probe = torch.tensor(True)
    inputs = [t.requires_grad_() for t in (x, values, bias)]
    y = block_sparse_linear(x, values, bias, layout, tap=tap, probe=probe)
    dx, dw, db, dtap = gradients(y, dy, *inputs, tap)

    x64, clean64, bias64, dy64 = (t.detach().double() for t in (x, clean, bias, dy))
    weight = reference.dense_weight(clean64, layout.index, 40, 50)
    assert_close(
        "y", y.detach(), F.linear(x64, weight, bias64), F.linear(x64.abs(), weight.abs(), bias64.abs())
    )
    assert_close("dx", dx, dy64 @ weight, dy64.abs() @ weight.abs())
    size, exact = dy64.abs().t() @ x64.abs(), dy64.t() @ x64
    assert_close("dw", by_position(dw, layout), exact * real(layout), size)
    assert torch.equal(db, dy.sum(0))
    assert dtap[0][layout.mask.flatten()].count_nonzero() == layout.live_count()
    assert dtap[1][~layout.mask.flatten()].count_nonzero() == layout.blocks - layout.live_count()


@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d(groups: int) -> None:
    conv = ConvGeometry(3, 2, 2, 1, 1, 0, groups=groups)
    layout, x, values, clean, bias, dy = operands(
        Case(32, 40, (16, 16), "random", 2, conv=conv, size=(5, 6)), "cpu"
    )
    inputs = [t.requires_grad_() for t in (x, values, bias)]
    y = block_sparse_conv2d(x, values, bias, layout)
    dx, dw, db = gradients(y, dy, *inputs)

    x64, clean64, bias64, dy64 = (t.detach().double().requires_grad_() for t in (x, clean, bias, dy))
    weight = reference.dense_weight(clean64.detach(), layout.index, 32, 40 // groups, conv).requires_grad_()
    exact = F.conv2d(x64, weight, bias64, conv[2:4], conv[4:6], conv[6:8], groups)
    exact_dx, exact_dw, exact_db = gradients(exact, dy64, x64, weight, bias64)
    sizes = [t.detach().abs().requires_grad_() for t in (x64, weight, bias64)]
    size = F.conv2d(*sizes, conv[2:4], conv[4:6], conv[6:8], groups)
    size_dx, size_dw, size_db = gradients(size, dy64.abs(), *sizes)
    assert_close("y", y.detach(), exact.detach(), size.detach())
    assert_close("dx", dx, exact_dx, size_dx)
    assert_close("dw", by_position(dw, layout), exact_dw * real(layout), size_dw)
    assert_close("db", db, exact_db, size_db)


def by_position(dw: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    groups = 1 if layout.conv is None else layout.conv.groups
    return reference.dense_weight(
        dw, layout.index, layout.out_features, layout.in_features // groups, layout.conv
    )


def real(layout: BlockLayout) -> torch.Tensor:
    """1.0 at live elements of the dense weight."""
    return by_position(torch.ones(layout.capacity, *reversed(layout.block)), layout)


def test_update_through_the_op() -> None:
    layout = BlockLayout(64, 64, 16, capacity=12, mask=torch.eye(4).bool())
    layout.update_(torch.ones(4, 4).bool())
    assert layout.live_count() == 12
    with pytest.raises(RuntimeError, match="4 blocks found no free slot"):
        layout.check()


@pytest.mark.parametrize(
    ("block", "dtype", "reason"),
    [
        (8, torch.float32, "blocks of 16, 32, 64 and 128"),
        (16, torch.bfloat16, "bfloat16"),
        (16, torch.float64, "float64"),
    ],
)
def test_what_cannot_run_is_refused(block: int, dtype: torch.dtype, reason: str) -> None:
    layout = BlockLayout(32, 32, block)
    values = torch.zeros(layout.capacity, block, block, dtype=dtype)
    with pytest.raises(RuntimeError, match=reason):
        block_sparse_linear(torch.zeros(2, 32, dtype=dtype), values, None, layout)
