"""Operands of the emulated convolution kernels, and what must come out, in plain numpy.

Images are ``[images, height, width, channels]``, dense weights ``[out, taps, channels of a group]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.cuda.emulation import as_dtype, as_float64
from tests.cuda.linear_cases import live_mask
from tests.kernels.packed_index import packed_index

Array = np.ndarray[Any, Any]
Pair = tuple[int, int]


class Case(NamedTuple):
    """``block`` is (outputs, inputs)."""

    images: int
    out: int
    inputs: int
    size: Pair
    block: Pair
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    mask: str = "random"
    dtype: str = "float16"
    precision: str = "ieee"
    processors: int = 1  # few: tiles of 128 pixels and sums in one part

    def __str__(self) -> str:
        pairs = [self.size, self.block, self.kernel, self.stride, self.padding, self.dilation]
        sizes = "-".join(f"{a}x{b}" for a, b in pairs)
        kind = self.dtype if self.dtype != "float32" else self.precision
        return f"{self.images}x{self.out}x{self.inputs}-{sizes}-g{self.groups}-{self.mask}-{kind}"

    @property
    def output_size(self) -> Pair:
        h, w = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return h, w

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def group_inputs(self) -> int:
        return self.inputs // self.groups

    @property
    def grid(self) -> Pair:
        """Block rows and columns."""
        return -(-self.out // self.block[0]), self.taps * -(-self.group_inputs // self.block[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The fields of ``Conv2dShape``."""
        return (
            self.images, self.inputs, *self.size, self.out, *self.output_size, *self.kernel, *self.stride,
            *self.padding, *self.dilation, self.groups, self.groups * _aligned(self.group_inputs),
            _aligned(self.out),
        )  # fmt: skip


class Operands(NamedTuple):
    """Arrays as kernels read them (``x``, ``dy``, ``values``, ``bias``), and the same in float64, clean.

    Unlisted slots and the padding of ragged blocks hold NaN.
    """

    case: Case
    mask: Array  # [rows, columns]
    slots: Array  # [rows, columns], -1: none
    capacity: int
    index: Array
    x: Array
    dy: Array
    values: Array
    bias: Array
    exact_x: Array
    exact_dy: Array
    exact_weight: Array
    exact_bias: Array

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows, columns and lists of the index, capacity, inputs and outputs of a block."""
        (rows, columns), (bo, bi), stride = self.case.grid, self.case.block, self.case.stride
        lists = self.case.groups * (columns // self.case.taps) * stride[0] * stride[1]
        return rows, columns, lists, self.capacity, bi, bo


def _aligned(channels: int) -> int:
    return channels + -channels % 16


def _pixels(images: Array, groups: int, dtype: str) -> Array:
    """Images as the launchers want them: zeros behind each group's channels up to a multiple of 16."""
    grouped = images.reshape(*images.shape[:3], groups, images.shape[3] // groups)
    padding = [(0, 0)] * 4 + [(0, -grouped.shape[4] % 16)]
    padded = np.pad(grouped, padding)
    return as_dtype(padded.reshape(*images.shape[:3], groups * padded.shape[4]), dtype)


def operands(case: Case, seed: int = 0) -> Operands:
    """Random operands of a case."""
    random = np.random.default_rng(seed)
    (bo, bi), dtype = case.block, case.dtype
    rows, columns = case.grid
    used = live_mask("random" if case.mask == "suspended" else case.mask, rows, columns, random)
    mask = used & ~live_mask("random", rows, columns, random) if case.mask == "suspended" else used
    capacity = min(int(used.sum()) + 1, rows * columns)
    slots = np.full((rows, columns), -1)
    slots[used] = random.permutation(capacity)[: int(used.sum())]
    index = packed_index(
        mask, slots, capacity, groups=case.groups, kernel=case.kernel, stride=case.stride,
        dilation=case.dilation,
    )  # fmt: skip

    x, dy, bias = (
        as_float64(as_dtype(random.standard_normal(shape), dtype))
        for shape in [
            (case.images, *case.size, case.inputs),
            (case.images, *case.output_size, case.out),
            (case.out,),
        ]
    )
    weight = np.zeros((case.out, case.taps, case.group_inputs))
    values = np.full((capacity, bi, bo), np.nan)
    for row, column in np.argwhere(mask):
        tap, block = divmod(int(column), columns // case.taps)
        part = weight[row * bo : (row + 1) * bo, tap, block * bi : (block + 1) * bi]  # a view
        part[:] = as_float64(as_dtype(random.standard_normal(part.shape), dtype))
        values[slots[row, column], : part.shape[1], : part.shape[0]] = part.T
    return Operands(
        case, mask, slots, capacity, index, _pixels(x, case.groups, dtype), _pixels(dy, 1, dtype),
        as_dtype(values, dtype), as_dtype(bias, dtype), x, dy, weight, bias,
    )  # fmt: skip


def _views(case: Case, padded: Array) -> Iterator[tuple[int, slice, Array]]:
    """Tap, outputs of a group, and the pixels that the tap sees for each output pixel."""
    (oh, ow), (sh, sw), (dh, dw) = case.output_size, case.stride, case.dilation
    outputs, inputs = case.out // case.groups, case.group_inputs
    for tap in range(case.taps):
        r, s = tap // case.kernel[1] * dh, tap % case.kernel[1] * dw
        seen = padded[:, r : r + (oh - 1) * sh + 1 : sh, s : s + (ow - 1) * sw + 1 : sw]
        for group in range(case.groups):
            channels = seen[..., group * inputs : (group + 1) * inputs]
            yield tap, slice(group * outputs, (group + 1) * outputs), channels


def _padded(case: Case, x: Array) -> Array:
    ph, pw = case.padding
    return np.pad(x, [(0, 0), (ph, ph), (pw, pw), (0, 0)])


def forward(case: Case, x: Array, weight: Array, bias: Array) -> Array:
    """The convolution of ``x``."""
    y = np.zeros((case.images, *case.output_size, case.out)) + bias
    for tap, outputs, seen in _views(case, _padded(case, x)):
        y[..., outputs] += seen @ weight[outputs, tap].T
    return y


def dgrad(case: Case, dy: Array, weight: Array) -> Array:
    """The gradient of the input."""
    dx = _padded(case, np.zeros((case.images, *case.size, case.inputs)))
    for tap, outputs, seen in _views(case, dx):  # views, written to
        seen += dy[..., outputs] @ weight[outputs, tap]
    (ph, pw), (h, w) = case.padding, case.size
    return dx[:, ph : ph + h, pw : pw + w]


def wgrad(case: Case, dy: Array, x: Array) -> Array:
    """The gradient of the dense weight."""
    dw = np.zeros((case.out, case.taps, case.group_inputs))
    for tap, outputs, seen in _views(case, _padded(case, x)):
        dw[outputs, tap] = np.tensordot(dy[..., outputs], seen, ([0, 1, 2], [0, 1, 2]))
    return dw


def by_block(case: Case, dense: Array) -> Array:
    """A dense weight as ``[rows, columns, bi, bo]``, zeros in the padding."""
    (bo, bi), (rows, columns) = case.block, case.grid
    padded = np.pad(dense, [(0, -case.out % bo), (0, 0), (0, -case.group_inputs % bi)])
    blocks = padded.reshape(rows, bo, case.taps, -1, bi).transpose(0, 2, 3, 4, 1)
    return blocks.reshape(rows, columns, bi, bo)


def by_slot(o: Operands, blocks: Array) -> Array:
    """Blocks of :func:`by_block` at listed slots, zeros in others: ``[capacity, bi, bo]``."""
    result = np.zeros((o.capacity, *blocks.shape[2:]))
    result[o.slots[o.mask]] = blocks[o.mask]
    return result
