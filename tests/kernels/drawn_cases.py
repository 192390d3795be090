"""Drawn shapes, masks and strides of layers, and the layouts that they ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from dynaprune_kernels import BlockLayout, ConvGeometry

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
BLOCKS = [8, 9, 16, 24, 32]
MASKS = ["random", "dead", "live", "one", "cross", "suspended"]
TAPS = ["none", "saliency", "probe"]


class Linear(NamedTuple):
    """A linear case; ``block`` is (outputs, inputs)."""

    tokens: int
    out: int
    inputs: int
    block: tuple[int, int]
    dtype: torch.dtype
    mask: str
    x_memory: str
    dy_memory: str
    bias: bool
    wanted: tuple[bool, bool, bool]
    tap: str
    spare_slots: int
    seed: int


class Conv(NamedTuple):
    """A convolution; ``inputs`` and ``out`` are channels over all groups."""

    images: int
    out: int
    inputs: int
    size: tuple[int, int]
    geometry: ConvGeometry
    block: tuple[int, int]
    dtype: torch.dtype
    mask: str
    x_memory: str
    dy_memory: str
    bias: bool
    wanted: tuple[bool, bool, bool]
    tap: str
    spare_slots: int
    seed: int


@st.composite
def linear_cases(draw: Callable[..., Any]) -> Linear:
    return Linear(
        tokens=draw(st.sampled_from([1, 2, 7, 32, 0])),
        out=draw(st.integers(1, 70)),
        inputs=draw(st.integers(1, 70)),
        block=(draw(st.sampled_from(BLOCKS)), draw(st.sampled_from(BLOCKS))),
        dtype=draw(st.sampled_from(DTYPES)),
        mask=draw(st.sampled_from(MASKS)),
        x_memory=draw(st.sampled_from(["contiguous", "three dims", "transposed", "sliced", "expanded"])),
        dy_memory=draw(st.sampled_from(["contiguous", "transposed", "sliced", "scalar", "row", "column"])),
        bias=draw(st.booleans()),
        wanted=draw(st.sampled_from(WANTED)),
        tap=draw(st.sampled_from(TAPS)),
        spare_slots=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def conv_cases(draw: Callable[..., Any]) -> Conv:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    block = (draw(st.sampled_from(BLOCKS)), draw(st.sampled_from(BLOCKS)))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (1, 4), (3, 1)]))
    stride, padding, dilation = (
        (draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 3), (0, 2), (1, 2))
    )
    extra = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = (max(reach[0], 1) + extra[0], max(reach[1], 1) + extra[1])
    return Conv(
        images=draw(st.sampled_from([1, 2, 7, 0])),
        out=draw(st.integers(1, 40)) if groups == 1 else groups * block[0] * draw(st.integers(1, 2)),
        inputs=groups * draw(st.integers(1, 40 if groups == 1 else 20)),
        size=size,
        geometry=ConvGeometry(*kernel, *stride, *padding, *dilation, groups),
        block=block,
        dtype=draw(st.sampled_from(DTYPES)),
        mask=draw(st.sampled_from(MASKS)),
        x_memory=draw(st.sampled_from(["channels last", "contiguous", "sliced", "expanded", "unbatched"])),
        dy_memory=draw(st.sampled_from(["channels last", "contiguous", "sliced", "scalar", "row", "column"])),
        bias=draw(st.booleans()),
        wanted=draw(st.sampled_from(WANTED)),
        tap=draw(st.sampled_from(TAPS)),
        spare_slots=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**16)),
    )


WANTED = [
    (True, True, True), (True, True, True), (False, True, True), (True, False, True), (False, True, False),
]  # fmt: skip


def draw_mask(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    if kind == "dead":
        return torch.zeros(rows, columns, dtype=torch.bool)
    if kind == "live":
        return torch.ones(rows, columns, dtype=torch.bool)
    row, column = (int(torch.randint(n, (), generator=generator)) for n in (rows, columns))
    if kind == "one":
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        mask[row, column] = True
        return mask
    if kind == "cross":
        mask = torch.ones(rows, columns, dtype=torch.bool)
        mask[row], mask[:, column] = False, False
        return mask
    return torch.rand(rows, columns, generator=generator) < torch.rand((), generator=generator)


def make_layout(case: Linear | Conv, generator: torch.Generator) -> BlockLayout:
    """A layout whose slots lie in the disorder that earlier masks leave behind."""
    options: dict[str, Any] = {"conv": case.geometry} if isinstance(case, Conv) else {}
    layout = BlockLayout(case.out, case.inputs, case.block, **options)
    first = draw_mask("random", layout.rows, layout.columns, generator)
    mask = draw_mask(case.mask, layout.rows, layout.columns, generator)
    capacity = min(max(int((first | mask).sum()), 1) + case.spare_slots, layout.blocks)
    layout = BlockLayout(case.out, case.inputs, case.block, mask=first, capacity=capacity, **options)
    layout.update_(mask)
    if case.mask == "suspended":
        layout.suspend_(draw_mask("random", layout.rows, layout.columns, generator))
    return layout
