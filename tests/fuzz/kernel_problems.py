"""Small layers for fuzzing the raw ops: their arguments, and what an op has to return for an index."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynaprune_kernels import reference
from dynaprune_kernels.geometry import Block, ConvGeometry, ceil_div
from tests.kernels.packed_index import packed_index

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# As in tests/kernels/test_ops_property.py, plus 1 for the rounding of the result.
ORDER_OF_SUMS = 5.0
BY_COLUMN = ("linear_dgrad", "conv2d_dgrad")  # the ops that walk along the column lists


class Problem(NamedTuple):
    """Tensors of one layer; ``conv`` is None for a linear one. ``block`` is (outputs, inputs)."""

    conv: ConvGeometry | None
    out: int
    inputs: int
    block: tuple[int, int]
    mask: np.ndarray
    slots: np.ndarray
    capacity: int
    index: Tensor
    x: Tensor
    dy: Tensor
    values: Tensor
    grad: Tensor
    bias: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def geometry(self) -> ConvGeometry:
        return self.conv or ConvGeometry(1, 1)

    @property
    def lists(self) -> int:
        g = self.geometry
        return g.groups * (self.grid[1] // g.taps) * g.phases


def index_of(p: Problem, mask: np.ndarray, slots: np.ndarray) -> Tensor:
    """The right index of blocks of the layer's grid."""
    g = p.geometry
    options = {"groups": g.groups, "kernel": g[0:2], "stride": g[2:4], "dilation": g[6:8]}
    return torch.from_numpy(packed_index(mask, slots, p.capacity, **options))


def draw_slots(mask_shape: tuple[int, int], capacity: int, draw: np.random.Generator) -> Any:
    """A mask and slots of at most ``capacity`` blocks, in disorder; some blocks are suspended."""
    blocks = mask_shape[0] * mask_shape[1]
    used = int(draw.integers(0, capacity + 1))
    slots = np.full(blocks, -1)
    slots[draw.choice(blocks, used, replace=False)] = draw.permutation(capacity)[:used]
    slots = slots.reshape(mask_shape)
    return (slots >= 0) & (draw.random(mask_shape) < 0.9), slots


def draw_problem(seed: str) -> Problem:
    """A linear layer or a convolution of at most some hundred channels."""
    pick = random.Random(seed)
    draw = np.random.default_rng(pick.getrandbits(63))
    generator = torch.Generator().manual_seed(pick.getrandbits(63))
    bo, bi = (pick.choice([4, 8, 9, 16, 24, 32]) for _ in range(2))
    conv, groups, taps = None, 1, 1
    if pick.random() < 0.5:
        groups = pick.choice([1, 1, 1, 2, 3])
        kernel = pick.choice([(1, 1), (3, 3), (2, 3), (1, 4)])
        stride, padding, dilation = (
            (pick.randint(low, high), pick.randint(low, high)) for low, high in ((1, 3), (0, 2), (1, 2))
        )
        conv = ConvGeometry(*kernel, *stride, *padding, *dilation, groups)
        taps = conv.taps
    inputs = groups * pick.randint(1, 80 if conv is None else 24)
    out = pick.randint(1, 80) if groups == 1 else groups * bo * pick.randint(1, 2)
    rows, columns = ceil_div(out, bo), taps * ceil_div(inputs // groups, bi)
    capacity = pick.randint(1, rows * columns)
    mask, slots = draw_slots((rows, columns), capacity, draw)
    dtype = pick.choice(DTYPES)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if conv is None:
        tokens = pick.choice([1, 3, 16, 40, 70])
        x, dy = drawn(tokens, inputs), drawn(tokens, out)
    else:
        size = [
            max(d * (k - 1) + 1 - 2 * p, 1) + pick.randint(0, 4)
            for d, k, p in zip(conv[6:8], conv[0:2], conv[4:6], strict=True)
        ]
        images = pick.choice([1, 2, 5])
        x, dy = drawn(images, inputs, *size), drawn(images, out, *conv.output_size(*size))
    values, grad, bias = drawn(capacity, bi, bo), drawn(capacity, bi, bo), drawn(out)
    p = Problem(conv, out, inputs, (bo, bi), mask, slots, capacity, torch.empty(0), x, dy, values, grad, bias)
    return p._replace(index=index_of(p, mask, slots))


def raw_calls(p: Problem, index: Tensor) -> dict[str, list[Any]]:
    """Arguments of ``torch.ops.dynaprune_cpu`` ops, by name; layout_update apart."""
    (rows, columns), (bo, bi), c = p.grid, p.block, p.capacity
    calls: dict[str, list[Any]] = {"block_saliency": [p.values, p.grad, index, rows, columns]}
    if p.conv is None:
        return calls | {
            "linear_forward": [p.x, p.values, p.bias, index, p.out],
            "linear_dgrad": [p.dy, p.values, index, p.inputs],
            "linear_wgrad": [p.dy, p.x, index, c, bi, bo],
            "linear_wgrad_saliency": [p.dy, p.x, p.values, index],
            "linear_probe": [p.dy, p.x, index, c, bi, bo],
        }
    conv = list(p.conv)
    return calls | {
        "conv2d_forward": [p.x, p.values, p.bias, index, p.out, conv],
        "conv2d_dgrad": [p.dy, p.values, index, list(p.x.shape), conv],
        "conv2d_wgrad": [p.dy, p.x, index, c, bi, bo, conv],
        "conv2d_wgrad_saliency": [p.dy, p.x, p.values, index, conv],
        "conv2d_probe": [p.dy, p.x, index, c, bi, bo, conv],
    }


def public_calls(p: Problem, index: Tensor) -> dict[str, list[Any]]:
    """Arguments of ``torch.ops.dynaprune`` ops, by the raw op's name, and the op's own name in front."""
    (rows, columns), (bo, bi), c = p.grid, p.block, p.capacity
    probe = torch.ones((), dtype=torch.bool)
    calls: dict[str, list[Any]] = {
        "block_saliency": ["block_saliency", p.values, p.grad, index, rows, columns]
    }
    if p.conv is None:
        return calls | {
            "linear_forward": ["block_sparse_linear", p.x, p.values, p.bias, index, p.out],
            "linear_dgrad": ["block_sparse_linear_dgrad", p.dy, p.values, index, p.inputs],
            "linear_wgrad": ["block_sparse_linear_wgrad", p.dy, p.x, index, c, [bo, bi]],
            "linear_wgrad_saliency": ["block_sparse_linear_wgrad_saliency", p.dy, p.x, p.values, index],
            "linear_probe": ["linear_gradient_probe", p.dy, p.x, index, c, [bo, bi], probe],
        }
    conv = list(p.conv)
    return calls | {
        "conv2d_forward": ["block_sparse_conv2d", p.x, p.values, p.bias, index, p.out, conv],
        "conv2d_dgrad": ["block_sparse_conv2d_dgrad", p.dy, p.values, index, list(p.x.shape), conv],
        "conv2d_wgrad": ["block_sparse_conv2d_wgrad", p.dy, p.x, index, c, [bo, bi], conv],
        "conv2d_wgrad_saliency": ["block_sparse_conv2d_wgrad_saliency", p.dy, p.x, p.values, index, conv],
        "conv2d_probe": ["conv2d_gradient_probe", p.dy, p.x, index, c, [bo, bi], conv, probe],
    }


def expected(p: Problem, op: str, index: Tensor, prepare: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """What the float64 reference returns, of tensors that ``prepare`` makes."""
    x, dy, values, grad, bias = (prepare(t.double()) for t in (p.x, p.dy, p.values, p.grad, p.bias))
    block, probe = Block(*p.block), torch.ones((), dtype=torch.bool)
    if op == "block_saliency":
        return reference.block_saliency(values, grad, index, *p.grid)
    of_conv = () if p.conv is None else (p.conv,)
    inputs = p.inputs if p.conv is None else list(x.shape)
    arguments: dict[str, tuple[Any, ...]] = {
        "forward": (x, values, bias, index, p.out, *of_conv),
        "dgrad": (dy, values, index, inputs, *of_conv),
        "wgrad": (dy, x, index, p.capacity, block, *of_conv),
        "wgrad_saliency": (dy, x, values, index, *of_conv),
        "probe": (dy, x, index, p.capacity, block, *of_conv, probe),
    }
    results = getattr(reference, op)(*arguments[op.partition("_")[2]])
    return results if isinstance(results, tuple) else (results,)


def listed(p: Problem, op: str, index: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mask and slots of the blocks that an index lists in the direction of the op."""
    (rows, columns), c = p.grid, p.capacity
    sizes = [8, c, rows + 1, c, c, p.lists + 1, c, c, c, rows, p.lists]
    parts = [part.numpy() for part in index.split(sizes)]
    live = int(parts[0][0])
    if op in BY_COLUMN:
        row, column, slot = (parts[k][:live] for k in (6, 7, 8))
    else:
        row = np.repeat(np.arange(rows), np.diff(parts[2]))
        column, slot = (parts[k][:live] for k in (3, 4))
    slots = np.full((rows, columns), -1)
    slots[row, column] = slot
    return slots >= 0, slots


def difference(p: Problem, op: str, index: Tensor, results: Any, lists_of: str) -> str | None:
    """How results differ from those for the blocks that ``index`` lists in the direction of the op
    ``lists_of``; None where they are right."""
    right = index_of(p, *listed(p, lists_of, index))
    truths = expected(p, op, right, lambda t: t)
    scales = expected(p, op, right, torch.abs)
    results = results if isinstance(results, tuple) else (results,)
    for number, (got, truth, scale) in enumerate(zip(results, truths, scales, strict=True)):
        if got.shape != truth.shape:
            return f"result {number} has shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        eps = max(torch.finfo(got.dtype).eps, torch.finfo(p.x.dtype).eps if op != "block_saliency" else 0.0)
        off = (got.double() - truth).abs()
        allowed = ORDER_OF_SUMS * eps * scale.abs() + torch.finfo(got.dtype).tiny
        if not bool((off <= allowed).all()):
            return f"result {number} is off by {float(off.max())}, {float((off - allowed).max())} too much"
    return None
