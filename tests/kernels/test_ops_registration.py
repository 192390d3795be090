"""Every op as PyTorch sees it: opcheck, gradcheck in float64, one compilation for all masks, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from dynaprune_kernels import (
    BlockLayout,
    ConvGeometry,
    _extension,
    block_saliency,
    block_sparse_conv2d,
    block_sparse_linear,
)

OPS = torch.ops.dynaprune
CONV = ConvGeometry(3, 2, 2, 1, 1, 1, 1, 2, 1)
GROUPED = ConvGeometry(3, 3, 1, 2, 1, 0, 2, 1, 2)
CASES = {"linear": None, "conv2d": CONV, "grouped conv2d": GROUPED}


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and not _extension.load().loaded:
        pytest.skip(str(_extension.load().reason))
    monkeypatch.setenv("DYNAPRUNE_BACKEND", request.param)
    return request.param


class Problem(NamedTuple):
    """One weight of 16 outputs and its operands; the slots of dead blocks hold NaN."""

    layout: BlockLayout
    x: Tensor
    dy: Tensor
    values: Tensor
    bias: Tensor


def problem(conv: ConvGeometry | None, dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(0)
    inputs = 20 if conv is None or conv.groups == 1 else 12 * conv.groups
    layout = BlockLayout(16, inputs, (8, 8), conv=conv)
    layout.update_(torch.rand(layout.rows, layout.columns) < 0.6)
    shape: tuple[int, ...] = (5, inputs) if conv is None else (2, inputs, 6, 5)
    out: tuple[int, ...] = (5, 16) if conv is None else (2, 16, *conv.output_size(6, 5))
    values = torch.randn(layout.capacity, 8, 8, dtype=dtype)
    listed = torch.zeros(layout.capacity, dtype=torch.bool)
    listed[layout.slot_of_block[layout.mask].long()] = True
    values[~listed] = float("nan")
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(out, dtype=dtype)
    return Problem(layout, x, dy, values, torch.randn(16, dtype=dtype))


def clean(p: Problem) -> Tensor:
    """Values without NaN: opcheck compares all inputs before and after."""
    return p.values.nan_to_num(0.5)


def calls(conv: ConvGeometry | None, dtype: torch.dtype) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every op of a family with arguments, by name."""
    p = problem(conv, dtype)
    index, capacity, block, values = p.layout.index, p.layout.capacity, [8, 8], clean(p)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    tap = torch.zeros(2, p.layout.blocks, dtype=accumulate, requires_grad=True)
    on = torch.tensor(True)
    x, w, b = (t.clone().requires_grad_() for t in (p.x, values, p.bias))
    dy = p.dy.clone().requires_grad_()
    grid = p.layout.rows, p.layout.columns
    wide = torch.zeros(3, p.layout.blocks, dtype=accumulate, requires_grad=True)
    own = {
        "input_mean_square": (OPS.input_mean_square, (p.x, 16, block, conv, on)),
        "block_saliency": (OPS.block_saliency, (values, torch.randn_like(values), index, *grid)),
        "layout_update": (
            OPS.layout_update,
            (torch.rand(grid) < 0.5, p.layout.slot_of_block, index, capacity, conv, True),
        ),
    }
    if conv is None:
        return own | {
            "forward": (OPS.block_sparse_linear, (x, w, b, index, 16)),
            "forward without bias": (OPS.block_sparse_linear, (x, w, None, index, 16)),
            "forward with tap": (OPS.block_sparse_linear, (x, w, b, index, 16, tap, on)),
            "forward with inputs": (OPS.block_sparse_linear, (x, w, b, index, 16, wide, on)),
            "dgrad": (OPS.block_sparse_linear_dgrad, (dy, w, index, x.shape[1])),
            "wgrad": (OPS.block_sparse_linear_wgrad, (dy, x, index, capacity, block)),
            "wgrad_saliency": (OPS.block_sparse_linear_wgrad_saliency, (p.dy, p.x, values, index)),
            "probe": (OPS.linear_gradient_probe, (p.dy, p.x, index, capacity, block, on)),
        }
    return own | {
        "forward": (OPS.block_sparse_conv2d, (x, w, b, index, 16, conv)),
        "forward without bias": (OPS.block_sparse_conv2d, (x, w, None, index, 16, conv)),
        "forward with tap": (OPS.block_sparse_conv2d, (x, w, b, index, 16, conv, tap, on)),
        "forward with inputs": (OPS.block_sparse_conv2d, (x, w, b, index, 16, conv, wide, on)),
        "forward, contiguous": (OPS.block_sparse_conv2d, (x, w, b, index, 16, conv, tap, on, False)),
        "dgrad": (OPS.block_sparse_conv2d_dgrad, (dy, w, index, list(x.shape), conv)),
        "dgrad, contiguous": (OPS.block_sparse_conv2d_dgrad, (dy, w, index, list(x.shape), conv, False)),
        "wgrad": (OPS.block_sparse_conv2d_wgrad, (dy, x, index, capacity, block, conv)),
        "wgrad_saliency": (OPS.block_sparse_conv2d_wgrad_saliency, (p.dy, p.x, values, index, conv)),
        "probe": (OPS.conv2d_gradient_probe, (p.dy, p.x, index, capacity, block, conv, on)),
    }


NAMES = [(family, name) for family in ("linear", "conv2d") for name in calls(CASES[family], torch.float32)]


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_opcheck(family: str, name: str, backend: str) -> None:
    op, arguments = calls(CASES[family], torch.float32)[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", ["forward with tap", "block_saliency"])
@pytest.mark.parametrize("family", ["linear", "conv2d"])
def test_opcheck_in_bfloat16(family: str, name: str, backend: str) -> None:
    op, arguments = calls(CASES[family], torch.bfloat16)[name]
    torch.library.opcheck(op, arguments)


def test_every_op_of_the_namespace_is_checked() -> None:
    checked = {op._qualified_op_name for c in (None, CONV) for op, _ in calls(c, torch.float32).values()}
    schemas = torch._C._jit_get_all_schemas()
    assert checked == {schema.name for schema in schemas if schema.name.startswith("dynaprune::")}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("kind", ["forward", "dgrad", "wgrad"])
def test_first_and_second_derivatives_in_float64(family: str, kind: str, backend: str) -> None:
    conv = CASES[family]
    p = problem(conv)
    tail = [] if conv is None else [conv]
    name = "block_sparse_linear" if conv is None else "block_sparse_conv2d"
    index = p.layout.index
    size = p.x.shape[1] if conv is None else list(p.x.shape)
    functions: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "forward": (
            lambda x, w, b: getattr(OPS, name)(x, w, b, index, 16, *tail),
            (p.x, p.values, p.bias),
        ),
        "dgrad": (lambda dy, w: getattr(OPS, f"{name}_dgrad")(dy, w, index, size, *tail), (p.dy, p.values)),
        "wgrad": (
            lambda dy, x: getattr(OPS, f"{name}_wgrad")(dy, x, index, p.layout.capacity, [8, 8], *tail),
            (p.dy, p.x),
        ),
    }
    function, inputs = functions[kind]
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    torch.autograd.gradcheck(function, inputs, fast_mode=True, check_batched_grad=True, **forward)
    torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("family", ["linear", "conv2d"])
def test_what_has_no_second_derivative_says_so(family: str, backend: str) -> None:
    p = problem(CASES[family])
    tap = torch.zeros(2, p.layout.blocks, dtype=torch.float64, requires_grad=True)
    x, values = p.x.requires_grad_(), clean(p).requires_grad_()
    conv = CASES[family]
    operation = block_sparse_linear if conv is None else block_sparse_conv2d
    y = operation(x, values, None, p.layout, tap=tap, probe=torch.tensor(True))
    (grad,) = torch.autograd.grad(y.square().sum(), tap, create_graph=True)
    with pytest.raises(RuntimeError, match=r"it is a statistic, detach its inputs"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("name", ["block_saliency", "wgrad_saliency", "probe", "input_mean_square"])
@pytest.mark.parametrize("family", ["linear", "conv2d"])
def test_statistics_run_under_torch_func_and_have_no_derivative(family: str, name: str, backend: str) -> None:
    op, (first, *rest) = calls(CASES[family], torch.float64)[name]

    def of(tensor: Tensor) -> Tensor:
        found = op(tensor, *rest)
        return found if isinstance(found, Tensor) else torch.cat([part.flatten() for part in found])

    several = torch.stack([first, 2 * first], 1)
    expected = torch.stack([of(first), of(2 * first)])
    torch.testing.assert_close(torch.func.vmap(of, 1)(several), expected)
    for derive in (torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=r"it is a statistic, detach its inputs"):
            derive(of)(first)


def test_a_tap_of_the_wrong_kind_is_refused() -> None:
    p = problem(None, torch.float32)
    tap = torch.zeros(2, p.layout.blocks, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match=r"float32 tap for torch.float32 inputs, got torch.float64"):
        block_sparse_linear(p.x, clean(p), None, p.layout, tap=tap)
    with pytest.raises(ValueError, match=r"a tap of 2 or 3 rows, got shape \(4, 6\)"):
        block_sparse_linear(p.x, clean(p), None, p.layout, tap=torch.zeros(4, 6, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", CASES)
def test_a_third_row_of_the_tap_has_the_mean_square_of_each_blocks_inputs(
    family: str, dtype: torch.dtype
) -> None:
    conv, p = CASES[family], problem(CASES[family], dtype)
    groups, taps = (1, 1) if conv is None else (conv.groups, conv.taps)
    width, rows = p.x.shape[1] // groups, p.layout.rows // groups
    x = p.x.double().movedim(1, -1).reshape(-1, groups, width)
    expected = torch.empty(p.layout.rows, p.layout.columns, dtype=torch.float64)
    for row in range(p.layout.rows):
        for column in range(p.layout.columns):
            at = column % (p.layout.columns // taps) * 8
            expected[row, column] = x[:, row // rows, at : at + 8].square().mean()
    operation = block_sparse_linear if conv is None else block_sparse_conv2d
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    for on in (True, False):
        taps_of = [torch.zeros(n, p.layout.blocks, dtype=accumulate, requires_grad=True) for n in (2, 3)]
        for tap in taps_of:
            y = operation(p.x, clean(p), None, p.layout, tap=tap, probe=torch.tensor(on))
            y.backward(p.dy)
        two, three = (tap.grad for tap in taps_of)
        assert torch.equal(two, three[:2])
        torch.testing.assert_close(three[2].view_as(expected).double(), expected * on, rtol=1e-5, atol=0)


def test_a_batch_without_tokens_has_no_inputs() -> None:
    found = OPS.input_mean_square(torch.zeros(0, 20), 16, [8, 8], None, torch.tensor(True))
    assert torch.equal(found, torch.zeros(6))


class _Network(torch.nn.Module):
    """Both families in one graph, with tap and probe."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = problem(CONV, torch.float32), problem(None, torch.float32)
        self.conv_layout, self.linear_layout = self.conv.layout, self.linear.layout
        self.conv_values = torch.nn.Parameter(clean(self.conv))
        self.linear_values = torch.nn.Parameter(clean(self.linear))
        self.tap = torch.nn.Parameter(torch.zeros(2, self.linear_layout.blocks))
        self.project = torch.nn.Linear(16, 20)
        self.register_buffer("probe", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        x = block_sparse_conv2d(x, self.conv_values, None, self.conv_layout).relu().mean((2, 3))
        return block_sparse_linear(
            self.project(x), self.linear_values, None, self.linear_layout, tap=self.tap, probe=self.probe
        )

    def step(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        self.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in self.parameters() if p.grad is not None)]


def test_fullgraph_without_recompilation_when_the_mask_changes(backend: str) -> None:
    torch._dynamo.reset()
    network = _Network()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for step in range(6):
        for layout in (network.conv_layout, network.linear_layout):
            layout.update_(torch.rand(layout.rows, layout.columns) < step / 5)
        network.probe.fill_(step % 2 == 1)
        x = torch.randn(2, 20, 6, 5)
        for got, expected in zip(network.step(compiled, x), network.step(network, x), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_the_update_and_the_saliency_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layout = BlockLayout(32, 32, (8, 8))
    values = torch.randn(16, 8, 8)

    @torch.compile(fullgraph=True, backend=counter)
    def update(mask: Tensor) -> Tensor:
        layout.update_(mask)
        return block_saliency(values, values, layout).weight_square

    for _ in range(4):
        mask = torch.rand(4, 4) < 0.5
        squares = update(mask)
        twin = BlockLayout(32, 32, (8, 8), mask=mask)
        assert torch.equal(layout.mask, mask) and torch.equal(squares > 0, mask)
        assert torch.equal(layout.lists.row_cols[: int(mask.sum())], twin.lists.row_cols[: int(mask.sum())])
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", CASES)
def test_flops_are_those_of_live_blocks(family: str) -> None:
    conv = CASES[family]
    p = problem(conv, torch.float32)
    values = clean(p).requires_grad_()
    operation = block_sparse_linear if conv is None else block_sparse_conv2d
    live = int(p.layout.mask.sum())
    positions = p.dy.numel() // 16
    tap = torch.zeros(2, p.layout.blocks, requires_grad=True)
    for wanted, probe, factor in ((None, False, 3), (tap, False, 3), (tap, True, None)):
        with FlopCounterMode(display=False) as counter:
            x, flag = p.x.requires_grad_(), torch.tensor(probe)
            operation(x, values, None, p.layout, tap=wanted, probe=flag).sum().backward()
        dense_blocks = 3 * live + (p.layout.blocks - live) if factor is None else factor * live
        assert counter.get_total_flops() == 2 * positions * 64 * dense_blocks
