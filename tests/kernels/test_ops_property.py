"""Drawn shapes, masks, strides and dtypes: outputs and gradients against the dense masked computation.

An entry passes with an error, against float64, of at most twice the error of the dense computation in the
same dtype plus ``ORDER_OF_SUMS * eps * (|a| |b|)``, which allows for another order of summation. Slots
without a live block and the padding of ragged blocks hold NaN, as do fresh outputs: what must not be read, or
must be written, shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynaprune_kernels import (
    BlockLayout,
    _extension,
    block_saliency,
    block_sparse_conv2d,
    block_sparse_linear,
    reference,
)
from tests.kernels.drawn_cases import Conv, Linear, conv_cases, linear_cases, make_layout
from tests.kernels.strides import strides_that_count

# c of the tolerance: n rounded partial sums of random terms are off by about half an eps * (|a| |b|) whatever
# n is, and by about 3 in the worst of 1e5 results; bounds for certain grow with n and would see nothing.
ORDER_OF_SUMS = 4.0


class Roundings(NamedTuple):
    """How many eps of (|a| |b|) an entry may be off: of each output, and of the sum over a block."""

    y: float = ORDER_OF_SUMS
    dx: float = ORDER_OF_SUMS
    dw: float = ORDER_OF_SUMS
    db: float = ORDER_OF_SUMS
    block: float = ORDER_OF_SUMS


USUAL = Roundings()
LINEAR_CASES, CONV_CASES = 1300, 900


def places(case: Linear | Conv, layout: BlockLayout) -> Iterator[tuple[int, int, tuple[Any, ...], int, int]]:
    """Row, column, and where in the dense weight a block lies, and how many outputs and inputs it has."""
    bo, bi = case.block
    conv = case.geometry if isinstance(case, Conv) else None
    inputs = case.inputs if conv is None else case.inputs // conv.groups
    channel_blocks = -(-inputs // bi)
    for row in range(layout.rows):
        for column in range(layout.columns):
            tap, channel = divmod(column, channel_blocks)
            outs, ins = slice(row * bo, (row + 1) * bo), slice(channel * bi, (channel + 1) * bi)
            sizes = min(bo, case.out - row * bo), min(bi, inputs - channel * bi)
            at: tuple[Any, ...] = (outs, ins)
            if conv is not None:
                at = (outs, ins, *divmod(tap, conv.kernel_w))
            yield row, column, at, *sizes


class Truth(NamedTuple):
    """What the dense masked computation says: output and gradients of input, weight and bias."""

    y: Tensor
    dx: Tensor
    dw: Tensor
    db: Tensor


def dense_run(case: Linear | Conv, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> Truth:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = torch.zeros(case.out, dtype=x.dtype) if bias is None else bias.detach()
    bias.requires_grad_()
    if isinstance(case, Conv):
        g = case.geometry
        y = F.conv2d(x, weight, bias, g[2:4], g[4:6], g[6:8], g.groups)
    else:
        y = F.linear(x, weight, bias)
    if dy.numel() == 0:
        return Truth(y.detach(), torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias))
    return Truth(y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy))


def in_memory(tensor: Tensor, memory: str) -> Tensor:
    """The same numbers, or for expanded kinds numbers repeated, in another memory layout."""
    if memory == "transposed":
        return tensor.t().contiguous().t()
    if memory == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if memory == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if tensor.numel() == 0:
        return tensor
    if memory == "scalar":
        return tensor.flatten()[0].expand(tensor.shape)
    if memory in ("row", "expanded"):
        return tensor[:1].expand(tensor.shape)
    if memory == "column":
        return tensor[:, :1].expand(tensor.shape)
    return tensor


def assert_close(
    name: str,
    got: Tensor,
    truth: Tensor,
    plain: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    order_of_sums: float = ORDER_OF_SUMS,
) -> None:
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    allowed = 2 * (plain.double() - truth).abs() + order_of_sums * torch.finfo(dtype).eps * scale
    error = (got.double() - truth).abs()
    wrong = ~(error <= allowed)
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} entries, first at {wrong.nonzero()[0].tolist()}: "
        f"got {got[wrong][0]}, expected {truth[wrong][0]}, allowed error {allowed[wrong][0]}"
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(case: Linear | Conv, roundings: Roundings = USUAL) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    conv = case.geometry if isinstance(case, Conv) else None
    layout = make_layout(case, generator)
    inputs = case.inputs if conv is None else case.inputs // conv.groups

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    weight = drawn(case.out, inputs, *(() if conv is None else conv[:2]))
    bo, bi = case.block
    values = torch.full((layout.capacity, bi, bo), float("nan"), dtype=case.dtype)
    masked = torch.zeros_like(weight)
    for row, column, at, outs, ins in places(case, layout):
        if layout.mask[row, column]:
            values[layout.slot_of_block[row, column], :ins, :outs] = weight[at].t()
            masked[at] = weight[at]
    bias = drawn(case.out) if case.bias else None
    if isinstance(case, Conv):
        x = drawn(case.images, case.inputs, *case.size)
        dy = drawn(case.images, case.out, *case.geometry.output_size(*case.size))
        unbatched = case.x_memory == "unbatched" and case.images == 1
        if unbatched:
            x, dy = x[0], dy[0]
    else:
        x, dy = drawn(case.tokens, case.inputs), drawn(case.tokens, case.out)
    x, dy = in_memory(x, case.x_memory), in_memory(dy, case.dy_memory if dy.dim() != 3 else "contiguous")

    double = [t.double() for t in (x, masked)], None if bias is None else bias.double(), dy.double()
    truth = dense_run(case, *double[0], *double[1:])
    scale = dense_run(
        case, *(t.abs() for t in double[0]), None if double[1] is None else double[1].abs(), double[2].abs()
    )
    plain = dense_run(case, x, masked, bias, dy)

    leaves = {"x": x.detach(), "values": values, "bias": bias}
    for (name, leaf), wanted in zip(leaves.items(), case.wanted, strict=True):
        leaves[name] = None if leaf is None else leaf.requires_grad_(wanted)
    tap = None
    if case.tap != "none":
        accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
        tap = torch.zeros(2, layout.blocks, dtype=accumulate, requires_grad=True)
    probe = torch.tensor(case.tap == "probe")
    operation = block_sparse_linear if conv is None else block_sparse_conv2d
    given_x = leaves["x"]
    if conv is None and case.x_memory == "three dims":
        given_x = given_x.unsqueeze(1)
        dy = dy.unsqueeze(1)
    with poisoned():
        y = operation(given_x, leaves["values"], leaves["bias"], layout, tap=tap, probe=probe)
        needed = [leaf for leaf in (*leaves.values(), tap) if leaf is not None and leaf.requires_grad]
        grads = dict(zip(map(id, needed), torch.autograd.grad(y, needed, dy), strict=True))
    y = y.detach().reshape(truth.y.shape)
    assert y.dtype == case.dtype
    if conv is not None and y.dim() == 4:
        assert strides_that_count(y) == strides_that_count(plain.y)
    assert_close("y", y, truth.y, plain.y, scale.y, case.dtype, roundings.y)
    if leaves["x"].requires_grad:
        assert_close("dx", grads[id(leaves["x"])], truth.dx, plain.dx, scale.dx, case.dtype, roundings.dx)
    if bias is not None and bias.requires_grad:
        assert_close("db", grads[id(bias)], truth.db, plain.db, scale.db, case.dtype, roundings.db)
    if values.requires_grad:
        check_values_grad(case, layout, values.detach(), grads[id(values)], truth, plain, scale, roundings)
    if tap is not None:
        check_tap(case, layout, weight.double(), grads[id(tap)], truth, plain, scale, roundings)


def check_values_grad(
    case: Linear | Conv,
    layout: BlockLayout,
    values: Tensor,
    dvalues: Tensor,
    truth: Truth,
    plain: Truth,
    scale: Truth,
    roundings: Roundings,
) -> None:
    """dW by slots with exact zeros elsewhere, and what ``block_saliency`` makes of it."""
    by_slot = [torch.zeros(values.shape, dtype=torch.float64) for _ in range(3)]
    inside = torch.zeros(values.shape, dtype=torch.bool)
    sums = torch.zeros(4, layout.rows, layout.columns, dtype=torch.float64)
    per_neuron = torch.zeros(layout.rows * case.block[0], dtype=torch.float64)
    absolute = per_neuron.clone()
    for row, column, at, outs, ins in places(case, layout):
        if not layout.mask[row, column]:
            continue
        slot = int(layout.slot_of_block[row, column])
        inside[slot, :ins, :outs] = True
        for target, source in zip(by_slot, (truth, plain, scale), strict=True):
            target[slot, :ins, :outs] = source.dw[at].double().t()
        w, g = values[slot, :ins, :outs].double(), dvalues[slot, :ins, :outs].double()
        terms = (w.square(), g.square(), (w * g).abs(), w * g)
        sums[:, row, column] = torch.stack([term.sum() for term in terms])
        first = row * case.block[0]
        per_neuron[first : first + outs] += (w * g).sum(0)
        absolute[first : first + outs] += (w * g).abs().sum(0)
    assert (dvalues[~inside] == 0).all(), "dvalues: expected exact zeros in unlisted slots and padding"
    assert_close("dvalues", dvalues, *by_slot, case.dtype, roundings.dw)

    clean = values.clone()
    listed = inside.any(2).any(1)
    clean[listed] = clean[listed].masked_fill(~inside[listed], 0)
    garbage = dvalues.clone()
    garbage[~listed] = float("nan")
    with poisoned():
        saliency = block_saliency(clean, garbage, layout)
    accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
    sizes = [sums[0], sums[1], sums[2], sums[2]]
    # Squares of repeated numbers all round the same way, so only the bound for certain holds: half an eps
    # per term. A term left out is still ten times as much.
    certain = case.block[0] * case.block[1] / 2 + 1
    certain_of_row = layout.columns * case.block[1] / 2 + 1
    for name, got, expected, size in zip(saliency._fields, saliency, sums, sizes, strict=False):
        assert got.dtype == accumulate
        assert_close(f"saliency {name}", got, expected, expected, size, accumulate, certain)
    neuron = per_neuron[: case.out]
    size = absolute[: case.out]
    assert_close("neuron", saliency.neuron_weight_grad, neuron, neuron, size, accumulate, certain_of_row)


def check_tap(
    case: Linear | Conv,
    layout: BlockLayout,
    weight: Tensor,
    dtap: Tensor,
    truth: Truth,
    plain: Truth,
    scale: Truth,
    roundings: Roundings,
) -> None:
    """Signed sums at live blocks; squared norms at the others while the probe is on; zeros elsewhere."""
    expected, allowed = torch.zeros(2, *dtap.shape, dtype=torch.float64)
    eps = torch.finfo(case.dtype).eps
    for row, column, at, _, _ in places(case, layout):
        block = row * layout.columns + column
        g = truth.dw[at]
        error = 2 * (plain.dw[at].double() - g).abs() + roundings.dw * eps * scale.dw[at]
        if layout.mask[row, column]:
            expected[0, block] = (weight[at] * g).sum()
            allowed[0, block] = (weight[at].abs() * (error + roundings.block * eps * g.abs())).sum()
        elif case.tap == "probe":
            expected[1, block] = g.square().sum()
            allowed[1, block] = ((2 * g.abs() + error) * error + roundings.block * eps * g.square()).sum()
    wrong = ~((dtap.double() - expected).abs() <= allowed)
    assert not wrong.any(), (
        f"tap at {wrong.nonzero()[0].tolist()}: got {dtap[wrong][0]}, expected {expected[wrong][0]}, "
        f"allowed error {allowed[wrong][0]}"
    )


@pytest.mark.parametrize("op", ["linear_forward", "linear_dgrad", "linear_wgrad", "linear_wgrad_saliency"])
def test_an_error_of_a_thousandth_is_seen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Linear(
        7, 20, 20, (8, 8), torch.float32, "live", "contiguous", "contiguous", True, (True,) * 3,
        "saliency" if "saliency" in op else "none", 0, 1,
    )  # fmt: skip
    monkeypatch.setenv("DYNAPRUNE_BACKEND", "reference")
    check(case)
    right = getattr(reference, op)

    def wrong(*arguments: Any) -> Any:
        results = right(*arguments)
        if isinstance(results, Tensor):
            return results * 1.001
        return results[0], results[1] * 1.001

    monkeypatch.setattr(reference, op, wrong)
    with pytest.raises(AssertionError, match="allowed error"):
        check(case)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and not _extension.load().loaded:
        pytest.skip(str(_extension.load().reason))
    monkeypatch.setenv("DYNAPRUNE_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize(
    ("cases", "number"),
    [(linear_cases(), LINEAR_CASES), (conv_cases(), CONV_CASES)],
    ids=["linear", "conv2d"],
)
def test_drawn_cases_match_the_dense_masked_computation(
    cases: st.SearchStrategy[Any], number: int, backend: str
) -> None:
    if backend == "reference" and _extension.load().loaded:
        number //= 4
    checked = 0

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Any) -> None:
        nonlocal checked
        check(case)
        checked += 1

    # oneDNN's convolution (torch 2.13) crashes, or returns NaN, in backward where a tap meets only padding.
    with warnings.catch_warnings(), torch.backends.mkldnn.flags(enabled=False):
        warnings.simplefilter("ignore")
        run()
    assert checked >= number
