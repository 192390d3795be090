"""The saliency kernels on host threads, against sums in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from tests.cuda.emulation import as_dtype, as_float64
from tests.kernels.packed_index import packed_index

pytestmark = pytest.mark.gpu_offline

Emulated = Callable[[str], ModuleType]


class Case(NamedTuple):
    """A mask's grid and blocks ``[bi, bo]``."""

    rows: int
    columns: int
    block: tuple[int, int]
    density: float = 0.5


CASES = {
    "one warp each": Case(5, 7, (16, 16)),
    "one warp, wide": Case(3, 4, (16, 128)),
    "one warp, tall": Case(3, 4, (128, 16)),
    "all warps": Case(3, 3, (64, 64)),
    "all warps, largest": Case(2, 3, (128, 128)),
    "all warps, wide": Case(2, 3, (32, 128)),
    "more columns than threads": Case(1, 300, (16, 16), 0.9),
    "nothing lives": Case(3, 4, (32, 32), 0.0),
}


def layout(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Live mask, slots (some of suspended blocks, in no order) and a capacity with room to spare."""
    random = np.random.default_rng(seed)
    shape = (case.rows, case.columns)
    mask = random.random(shape) < case.density
    mask[0, 1:] &= case.rows == 1  # an all but empty row
    held = mask | (random.random(shape) < 0.2)
    capacity = int(held.sum()) + 3
    slots = np.full(shape, -1)
    slots[held] = random.permutation(capacity)[: held.sum()]
    return mask, slots, capacity


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_sums(emulated: Emulated, name: str, dtype: str) -> None:
    case = CASES[name]
    mask, slots, capacity = layout(case)
    index = packed_index(mask, slots, capacity)
    random = np.random.default_rng(1)
    values, gradient = (
        as_dtype(random.standard_normal((capacity, *case.block)).astype(np.float32), dtype) for _ in range(2)
    )
    unlisted = np.setdiff1d(np.arange(capacity), slots[mask])
    nan = as_dtype(np.full(1, np.nan, np.float32), dtype)
    values[unlisted], gradient[unlisted] = nan, nan  # what such a slot holds is never read
    stats, neuron = emulated("saliency").block_saliency(
        values, gradient, index, case.rows, case.columns, case.columns
    )

    w, g = np.zeros((2, case.rows, case.columns, *case.block))
    w[mask], g[mask] = as_float64(values)[slots[mask]], as_float64(gradient)[slots[mask]]
    terms = [w * w, g * g, abs(w * g), w * g]
    expected = np.stack([term.sum((2, 3)).reshape(-1) for term in terms])
    # float32 sums in a tree or along a column: far fewer than sqrt(n) roundings of the sum of magnitudes.
    bound = np.stack([abs(term).sum((2, 3)).reshape(-1) for term in terms])
    assert (abs(stats - expected) <= 16 * np.finfo(np.float32).eps * bound).all()
    expected, bound = (term.sum((1, 2)).reshape(-1) for term in (w * g, abs(w * g)))
    assert (abs(neuron - expected) <= 16 * np.finfo(np.float32).eps * bound).all()


def test_same_sums_in_any_order_of_blocks(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["all warps"]
    mask, slots, capacity = layout(case)
    index = packed_index(mask, slots, capacity)
    values, gradient = np.random.default_rng(2).standard_normal((2, capacity, *case.block), dtype=np.float32)
    results = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("DYN_EMULATION_BLOCK_ORDER", order)
        module = emulated("saliency")
        results.append(module.block_saliency(values, gradient, index, case.rows, case.columns, case.columns))
    for forward, reverse in zip(*results, strict=True):
        assert forward.tobytes() == reverse.tobytes()
