"""Operands of the emulated linear kernels and what must come out, in numpy: sanitized runs have no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.cuda.emulation import as_dtype, as_float64
from tests.kernels.packed_index import packed_index

Array = np.ndarray[Any, Any]

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "tf32": 2.0**-10}
# n rounded partial sums of random terms are off by about half an eps * (|a| |b|) whatever n is.
ORDER_OF_SUMS = 4.0


class Case(NamedTuple):
    """``block`` is (outputs, inputs)."""

    tokens: int
    out: int
    inputs: int
    block: tuple[int, int]
    mask: str = "random"
    dtype: str = "float32"
    precision: str = "ieee"

    def __str__(self) -> str:
        kind = self.dtype if self.dtype != "float32" else self.precision
        return f"{self.tokens}x{self.out}x{self.inputs}-{self.block[0]}x{self.block[1]}-{self.mask}-{kind}"


class Operands(NamedTuple):
    """Arrays as kernels read them (``x``, ``dy``, ``values``, ``bias``), and the same in float64, clean.

    Rows of ``x`` and ``dy`` are followed by zeros up to a multiple of 16 elements, those of ``x`` then by
    NaN; ``dy`` ends there, where AddressSanitizer sees it. Unlisted slots and the padding of ragged blocks
    hold NaN.
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
    exact_weight: Array  # [out, inputs]
    exact_bias: Array

    @property
    def layer(self) -> dict[str, Any]:
        """Arguments of every emulated launcher."""
        c = self.case
        return {"index": self.index, "in_": c.inputs, "out": c.out, "precision": c.precision}


def live_mask(kind: str, rows: int, columns: int, random: np.random.Generator) -> Array:
    """A mask of ``rows x columns`` blocks."""
    mask = random.random((rows, columns)) < (0.9 if kind == "dense" else 0.5)
    if kind in ("dead", "one"):
        mask[:] = False
        mask[rows // 2, columns // 2] = kind == "one"
    elif kind in ("live", "cross"):
        mask[:] = True
        if kind == "cross":  # an empty row and an empty column beside full ones
            mask[0] = False
            mask[:, -1] = False
    return mask


def followed(a: Array, dtype: str, gap: int) -> Array:
    """``a`` as the launchers want its rows, with ``gap`` elements between them that must not be read."""
    rows, width = a.shape
    padded = -(-width // 16) * 16
    result = np.zeros((rows, padded + gap))
    result[:, :width] = a
    result[:, padded:] = np.nan
    return as_dtype(result, dtype)


def operands(case: Case, seed: int = 0) -> Operands:
    """Random operands of a case."""
    random = np.random.default_rng(seed)
    (bo, bi), dtype = case.block, case.dtype
    rows, columns = -(-case.out // bo), -(-case.inputs // bi)
    suspended = np.zeros((rows, columns), bool)
    used = live_mask("random" if case.mask == "suspended" else case.mask, rows, columns, random)
    if case.mask == "suspended":
        suspended = used & live_mask("random", rows, columns, random)
    capacity = min(int(used.sum()) + 1, rows * columns)
    slots = np.full((rows, columns), -1)
    slots[used] = random.permutation(capacity)[: int(used.sum())]
    mask = used & ~suspended
    index = packed_index(mask, slots, capacity)

    x, dy, bias = (
        random.standard_normal(s) for s in [(case.tokens, case.inputs), (case.tokens, case.out), case.out]
    )
    exact_weight = np.zeros((rows * bo, columns * bi))
    values = np.full((capacity, bi, bo), np.nan)
    for row, column in np.argwhere(mask):
        height, width = min(bo, case.out - row * bo), min(bi, case.inputs - column * bi)
        block = as_float64(as_dtype(random.standard_normal((width, height)), dtype))
        values[slots[row, column], :width, :height] = block
        exact_weight[row * bo : row * bo + height, column * bi : column * bi + width] = block.T
    arrays = followed(x, dtype, 16), followed(dy, dtype, 0), as_dtype(values, dtype), as_dtype(bias, dtype)
    return Operands(
        case, mask, slots, capacity, index, *arrays,
        as_float64(arrays[0])[:, : case.inputs], as_float64(arrays[1])[:, : case.out],
        exact_weight[: case.out, : case.inputs], as_float64(arrays[3]),
    )  # fmt: skip


def by_block(dense: Array, o: Operands) -> Array:
    """A dense ``[out, inputs]`` matrix as ``[rows, columns, bi, bo]``, zeros in the padding."""
    (bo, bi), (rows, columns) = o.case.block, o.mask.shape
    padded = np.zeros((rows * bo, columns * bi))
    padded[: dense.shape[0], : dense.shape[1]] = dense
    return padded.reshape(rows, bo, columns, bi).transpose(0, 2, 3, 1)


def by_slot(dense: Array, o: Operands) -> Array:
    """The same at listed blocks as ``[capacity, bi, bo]``, zeros in other slots."""
    blocks = by_block(dense, o)
    result = np.zeros((o.capacity, *blocks.shape[2:]))
    result[o.slots[o.mask]] = blocks[o.mask]
    return result


def assert_close(name: str, o: Operands, actual: Array, exact: Array, magnitude: Array) -> None:
    """An error of one rounding to the result's type, and that of sums whose terms add up to ``magnitude``."""
    eps = EPS["tf32" if o.case.dtype == "float32" and o.case.precision == "tf32" else "float32"]
    result = as_float64(actual)
    assert result.shape == exact.shape, f"{name}: {result.shape}, expected {exact.shape}"
    assert not np.isnan(result).any(), f"{name} has NaN at {np.argwhere(np.isnan(result))[:4].tolist()}"
    rounding = {np.float32: EPS["float32"], np.float16: EPS["float16"], np.uint16: EPS["bfloat16"]}
    allowed = ORDER_OF_SUMS * eps * magnitude + rounding[actual.dtype.type] * np.abs(exact)
    allowed += 2.0**-24 * (actual.dtype == np.float16)  # half of what its smallest numbers are apart
    error = np.abs(result - exact)
    assert (error <= allowed).all(), (
        f"{name}: off by {error.max():.3g}, {(error > allowed).sum()} of {error.size} results, first "
        f"{np.argwhere(error > allowed)[:4].tolist()}"
    )
