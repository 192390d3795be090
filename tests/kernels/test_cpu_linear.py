"""The C++ CPU kernels of linear layers against dense float64, op by op, through their raw library."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import dynaprune_kernels._extension as extension
from tests.kernels.packed_index import packed_index, updated_slots

STATUS = extension.load()
pytestmark = pytest.mark.skipif(not STATUS.loaded, reason=str(STATUS.reason))
ops = torch.ops.dynaprune_cpu

FLOATS = [torch.float32, torch.bfloat16, torch.float64]
NAN = float("nan")


@dataclass
class Layer:
    """A block-sparse weight with poisoned padding and free slots, its dense twin, and activations."""

    bi: int
    bo: int
    mask: np.ndarray  # [rows, columns]
    slots: np.ndarray  # [rows, columns]
    index: Tensor
    values: Tensor
    weight: Tensor  # [out, in]
    bias: Tensor
    x: Tensor
    dy: Tensor

    @property
    def out(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    def to_blocks(self, dense: Tensor) -> Tensor:
        """``[out, in]`` as ``[rows, columns, bi, bo]``, zeros in padding."""
        rows, columns = self.mask.shape
        padded = dense.new_zeros(rows * self.bo, columns * self.bi)
        padded[: self.out, : self.inputs] = dense
        return padded.view(rows, self.bo, columns, self.bi).permute(0, 2, 3, 1)

    def by_slot(self, dense: Tensor) -> Tensor:
        """Live blocks of ``[out, in]`` in their slots ``[capacity, bi, bo]``, zeros elsewhere."""
        blocks = self.to_blocks(dense)
        stored = dense.new_zeros(self.values.shape)
        for row, column in np.argwhere(self.mask):
            stored[self.slots[row, column]] = blocks[row, column]
        return stored


def make_layer(
    m: int,
    inputs: int,
    out: int,
    bi: int,
    bo: int,
    mask: np.ndarray | float,
    dtype: torch.dtype = torch.float32,
    *,
    spare: int = 3,
) -> Layer:
    """Random layer; ``mask`` is an array or a density. ``spare`` slots are free, one of them suspended."""
    rng = np.random.default_rng(m * 7919 + inputs * 31 + out)
    rows, columns = -(-out // bo), -(-inputs // bi)
    if isinstance(mask, float):
        mask = rng.random((rows, columns)) < mask
    live = np.argwhere(mask)
    capacity = len(live) + spare
    slots = np.full((rows, columns), -1, np.int32)
    order = rng.permutation(capacity)
    for (row, column), slot in zip(live, order, strict=False):
        slots[row, column] = slot
    suspended = np.argwhere(~mask)
    if spare and len(suspended):
        slots[tuple(suspended[0])] = order[len(live)]
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    dense = random(out, inputs)
    alive = torch.from_numpy(mask).repeat_interleave(bo, 0).repeat_interleave(bi, 1)[:out, :inputs]
    values = torch.full((capacity, bi, bo), NAN, dtype=dtype)
    for row, column in live:
        block = dense[row * bo : (row + 1) * bo, column * bi : (column + 1) * bi].t()
        values[slots[row, column], : block.shape[0], : block.shape[1]] = block
    index = torch.from_numpy(packed_index(mask, slots, capacity))
    return Layer(
        bi, bo, mask, slots, index, values, dense * alive, random(out), random(m, inputs), random(m, out)
    )


def assert_close(got: Tensor, exact: Tensor, scale: Tensor, torch_result: Tensor | None = None) -> None:
    """Error of each element at most twice torch's own plus 4 eps of the summed magnitudes ``scale``."""
    eps = torch.finfo(got.dtype).eps
    bound = 4 * eps * scale
    if torch_result is not None:
        bound = bound + 2 * (torch_result.double() - exact).abs()
    assert got.shape == exact.shape
    error = (got.double() - exact).abs()
    assert bool((error <= bound).all()), f"largest excess {(error - bound).max().item():.3e}"


def check_layer(layer: Layer) -> None:
    """All five ops of one layer against dense float64."""
    x, dy, w, b = (t.double() for t in (layer.x, layer.dy, layer.weight, layer.bias))
    stored = (layer.values, layer.index)

    y = ops.linear_forward(layer.x, layer.values, layer.bias, layer.index, layer.out)
    scale = x.abs() @ w.abs().t() + b.abs()
    assert_close(y, x @ w.t() + b, scale, torch.nn.functional.linear(layer.x, layer.weight, layer.bias))
    y = ops.linear_forward(layer.x, layer.values, None, layer.index, layer.out)
    assert_close(y, x @ w.t(), x.abs() @ w.abs().t(), layer.x @ layer.weight.t())

    dx = ops.linear_dgrad(layer.dy, *stored, layer.inputs)
    assert_close(dx, dy @ w, dy.abs() @ w.abs(), layer.dy @ layer.weight)

    exact, torch_dw = dy.t() @ x, layer.dy.t() @ layer.x
    magnitude = dy.abs().t() @ x.abs()
    dvalues = ops.linear_wgrad(layer.dy, layer.x, layer.index, len(layer.values), layer.bi, layer.bo)
    assert_close(dvalues, layer.by_slot(exact), layer.by_slot(magnitude), layer.by_slot(torch_dw))

    again, wg = ops.linear_wgrad_saliency(layer.dy, layer.x, *stored)
    assert torch.equal(again, dvalues)
    statistic = torch.float64 if layer.x.dtype == torch.float64 else torch.float32
    assert wg.dtype == statistic
    assert_close(wg, block_sums(layer, w * exact), block_sums(layer, w.abs() * magnitude))

    squares = ops.linear_probe(layer.dy, layer.x, layer.index, len(layer.values), layer.bi, layer.bo)
    assert squares.dtype == statistic
    dead = torch.from_numpy(~layer.mask).flatten()
    assert_close(squares, block_sums(layer, exact.square()) * dead, block_sums(layer, magnitude.square()))
    assert bool((squares[~dead] == 0).all())


def block_sums(layer: Layer, dense: Tensor) -> Tensor:
    return layer.to_blocks(dense).sum((2, 3)).flatten()


SHAPES = [  # m, inputs, out, bi, bo
    (1, 64, 64, 32, 32),
    (1, 70, 50, 16, 8),
    (2, 33, 129, 8, 128),
    (7, 100, 90, 32, 64),
    (32, 96, 96, 16, 16),
    (33, 100, 190, 24, 40),
    (49, 97, 33, 5, 3),
    (50, 96, 130, 96, 48),
    (65, 128, 130, 128, 64),
    (130, 257, 129, 64, 128),
    (150, 30, 20, 8, 8),
    (17, 1, 1, 8, 8),
    (40, 128, 64, 128, 64),
    (300, 200, 96, 32, 32),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "inputs", "out", "bi", "bo"), SHAPES)
def test_every_op_agrees_with_dense(
    m: int, inputs: int, out: int, bi: int, bo: int, dtype: torch.dtype
) -> None:
    for density in (0.0, 0.15, 0.6, 1.0):
        check_layer(make_layer(m, inputs, out, bi, bo, density, dtype))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("m", [1, 20, 60, 200])
def test_one_block_and_empty_rows_and_columns(m: int) -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[2, 3] = True
    check_layer(make_layer(m, 5 * 16, 4 * 16, 16, 16, mask))
    mask = np.ones((4, 5), dtype=bool)
    mask[1] = mask[:, 2] = False
    check_layer(make_layer(m, 5 * 16 - 3, 4 * 16 - 5, 16, 16, mask))
    check_layer(make_layer(m, 5 * 16 - 3, 4 * 16 - 5, 16, 16, mask, spare=0))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_rows(dtype: torch.dtype) -> None:
    layer = make_layer(0, 64, 96, 32, 32, 0.5, dtype)
    assert ops.linear_forward(layer.x, layer.values, None, layer.index, layer.out).shape == (0, 96)
    assert ops.linear_dgrad(layer.dy, layer.values, layer.index, layer.inputs).shape == (0, 64)
    dvalues, wg = ops.linear_wgrad_saliency(layer.dy, layer.x, layer.values, layer.index)
    assert not dvalues.any()
    assert not wg.any()
    assert not ops.linear_probe(layer.dy, layer.x, layer.index, len(layer.values), 32, 32).any()


@pytest.mark.parametrize("m", [1, 100])
def test_denormals_count_as_zero_inside_a_kernel_only(m: int) -> None:
    slots = np.arange(16).reshape(4, 4)
    index = torch.from_numpy(packed_index(np.ones((4, 4), dtype=bool), slots, 16))
    values = torch.full((16, 32, 32), 1e-40)
    y = ops.linear_forward(torch.ones(m, 128), values, None, index, 128)
    dx = ops.linear_dgrad(torch.ones(m, 128), values, index, 128)
    assert bool((y == 0).all()) and bool((dx == 0).all())
    unchanged = (values * 1.0).view(torch.int32).equal(values.view(torch.int32))
    assert unchanged, "the caller's own arithmetic must keep its denormals"


@pytest.mark.usefixtures("poisoned_memory")
def test_infinite_activations_stay_out_of_padding() -> None:
    layer = make_layer(70, 45, 50, 32, 32, 1.0)
    layer.x[3], layer.dy[5] = float("inf"), float("-inf")
    dvalues = ops.linear_wgrad(layer.dy, layer.x, layer.index, len(layer.values), 32, 32)
    padding = layer.by_slot(torch.ones(50, 45)) == 0
    assert not dvalues[padding].any()


@pytest.mark.parametrize("m", [1, 32, 100, 700])
def test_any_strides_of_the_activations(m: int) -> None:
    layer = make_layer(m, 96, 64, 32, 32, 0.5)
    sum_gradient = torch.ones(()).expand(m, layer.out)
    strided = layer.x.t().contiguous().t()
    for op, args in (
        (ops.linear_dgrad, (layer.values, layer.index, layer.inputs)),
        (ops.linear_wgrad, (layer.x, layer.index, len(layer.values), 32, 32)),
        (ops.linear_probe, (layer.x, layer.index, len(layer.values), 32, 32)),
    ):
        assert torch.equal(op(sum_gradient, *args), op(sum_gradient.contiguous(), *args))
    forward = (layer.values, None, layer.index, layer.out)
    assert torch.equal(ops.linear_forward(strided, *forward), ops.linear_forward(layer.x, *forward))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [3, 40, 600])
def test_bitwise_equal_for_any_number_of_threads(m: int, dtype: torch.dtype) -> None:
    layer = make_layer(m, 300, 430, 24, 40, 0.6, dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                [
                    ops.linear_forward(layer.x, layer.values, layer.bias, layer.index, layer.out),
                    ops.linear_dgrad(layer.dy, layer.values, layer.index, layer.inputs),
                    *ops.linear_wgrad_saliency(layer.dy, layer.x, layer.values, layer.index),
                    ops.linear_probe(layer.dy, layer.x, layer.index, len(layer.values), layer.bi, layer.bo),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("bi", "bo"), [(32, 32), (5, 19), (64, 8)])
def test_block_saliency(bi: int, bo: int, dtype: torch.dtype) -> None:
    layer = make_layer(1, 6 * bi, 4 * bo, bi, bo, 0.5, dtype)
    grad = torch.randn(layer.values.shape, dtype=torch.float64).to(dtype)
    stats, neuron = ops.block_saliency(layer.values, grad, layer.index, 4, 6)
    w = layer.to_blocks(layer.weight.double())
    g = torch.zeros_like(w)
    for row, column in np.argwhere(layer.mask):
        g[row, column] = grad[layer.slots[row, column]].double()
    terms = torch.stack([w.square(), g.square(), (w * g).abs(), w * g]).flatten(3).sum(3).flatten(1)
    scale = torch.stack([w.square(), g.square(), (w * g).abs(), (w * g).abs()]).flatten(3).sum(3).flatten(1)
    assert_close(stats, terms, scale * bi)
    assert_close(neuron, (w * g).sum((1, 2)).flatten(), (w * g).abs().sum((1, 2)).flatten() * bi)
    assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


CONVS: list[dict[str, tuple[int, int] | int]] = [
    {},
    {"groups": 2},
    {"kernel": (3, 3), "stride": (2, 1), "dilation": (1, 2)},
    {"groups": 2, "kernel": (3, 2), "stride": (2, 3), "dilation": (3, 1)},
]


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_layout_update(conv: dict[str, tuple[int, int] | int], release: bool) -> None:
    rng = np.random.default_rng(0)
    taps = int(np.prod(conv.get("kernel", (1, 1))))
    for _ in range(60):
        rows, columns = 2 * int(rng.integers(1, 5)), taps * int(rng.integers(1, 7))
        capacity = int(rng.integers(0, 2 * rows * columns))
        mask = rng.random((rows, columns)) < rng.choice([0.0, 0.3, 0.8, 1.0])
        slots = np.full((rows, columns), -1, np.int32)
        taken = int(rng.integers(0, min(capacity, rows * columns) + 1))
        slots.reshape(-1)[rng.permutation(rows * columns)[:taken]] = rng.permutation(capacity)[:taken]
        new_mask, new_slots, dropped = updated_slots(mask, slots, capacity, release)
        expected = packed_index(new_mask, new_slots, capacity, overflow=dropped, **conv)  # type: ignore[arg-type]
        index = torch.full((len(expected),), 2**31 - 1, dtype=torch.int32)
        tensors = torch.from_numpy(mask), torch.from_numpy(slots)
        geometry = [conv.get(name, (1, 1)) for name in ("kernel", "stride", "dilation")]
        ops.layout_update(*tensors, index, capacity, conv.get("groups", 1), *geometry, release)
        assert np.array_equal(mask, new_mask)
        assert np.array_equal(slots, new_slots)
        assert np.array_equal(index.numpy(), expected)


def test_layout_update_refuses_slots_that_cannot_be() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    index = torch.zeros(8 + 3 + 3 + 4 * 6 + 4, dtype=torch.int32)
    for slots in ([[0, 0], [-1, -1]], [[4, -1], [-1, -1]]):
        before = torch.tensor(slots, dtype=torch.int32)
        slot_of_block = before.clone()
        with pytest.raises(RuntimeError, match="below capacity 4, each at most once"):
            ops.layout_update(mask, slot_of_block, index, 4, 1, [1, 1], [1, 1], [1, 1], True)
        assert torch.equal(slot_of_block, before)


def wrong_inputs() -> list[tuple[str, str, list[object]]]:
    """Op, what the message must say, arguments."""
    layer = make_layer(4, 64, 96, 32, 32, 0.5)
    x, dy, v, index, cap = layer.x, layer.dy, layer.values, layer.index, len(layer.values)
    return [
        (
            "linear_forward",
            r"expected x \[M, in\], got shape \[4, 2, 32\]",
            [x.view(4, 2, 32), v, None, index, 96],
        ),
        (
            "linear_forward",
            "expected values of the dtype of x .Float., got Double",
            [x, v.double(), None, index, 96],
        ),
        ("linear_forward", "float32, bfloat16 or float64, got Half", [x.half(), v.half(), None, index, 96]),
        ("linear_forward", r"expected bias \[96\], got shape \[95\]", [x, v, torch.ones(95), index, 96]),
        ("linear_forward", "expected an int32 index, got Long", [x, v, None, index.long(), 96]),
        ("linear_forward", "expected an index of .* elements for 4 block rows", [x, v, None, index, 97]),
        (
            "linear_forward",
            "expected an index of .* 3 block columns",
            [torch.ones(4, 65), v, None, index, 96],
        ),
        ("linear_forward", "expected contiguous values", [x, v.transpose(1, 2), None, index, 96]),
        ("linear_dgrad", r"expected dy \[M, out\], got shape \[4\]", [dy[:, 0], v, index, 64]),
        ("linear_wgrad", r"as many rows in dy as in x \(4\), got 3", [dy[:3], x, index, cap, 32, 32]),
        ("linear_wgrad", "a block of at least 1 x 1, got 0 x 32", [dy, x, index, cap, 0, 32]),
        ("linear_wgrad", "expected capacity >= 0, got -1", [dy, x, index, -1, 32, 32]),
        ("linear_wgrad_saliency", "expected dy of the dtype of x", [dy.double(), x, v, index]),
        ("linear_probe", "expected an index of .* elements", [dy, x, index[:-1], cap, 32, 32]),
        ("linear_probe", "expected an index of .* elements", [dy, x, index, cap + 1, 32, 32]),
        ("block_saliency", "expected grad of the shape of values", [v, v[1:], index, 3, 2]),
        ("block_saliency", "expected an index of", [v, v, index, 9999, 2]),
        (
            "layout_update",
            "expected a bool mask, got Byte",
            [torch.ones(3, 2, dtype=torch.uint8), index, index, cap, 1, [1, 1], [1, 1], [1, 1], True],
        ),
    ]


@pytest.mark.parametrize("case", range(17))
def test_wrong_input_says_what_was_expected(case: int) -> None:
    op, message, arguments = wrong_inputs()[case]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(*arguments)
