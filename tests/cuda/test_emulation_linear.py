"""The linear kernels on host threads, against products in float64.

Outputs and workspace start as NaN, as does whatever the kernels must not read (see ``Operands``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from tests.cuda.emulation import CHOSEN
from tests.cuda.linear_cases import Array, Case, Operands, assert_close, by_block, by_slot, operands
from tests.kernels.packed_index import packed_index

pytestmark = pytest.mark.gpu_offline

Emulated = Callable[[str], ModuleType]

TYPES = {
    "float32": ("float32", "ieee"),
    "tf32": ("float32", "tf32"),
    "float16": ("float16", "ieee"),
    "bfloat16": ("bfloat16", "ieee"),
}
CASES = {  # tokens, outputs, inputs, (outputs, inputs) of a block
    "merged blocks": Case(21, 53, 75, (16, 16)),
    "everything lives": Case(5, 64, 96, (32, 32), "live"),
    "an empty row and column": Case(17, 75, 53, (16, 32), "cross"),
    "suspended blocks": Case(33, 90, 70, (32, 16), "suspended"),
    "blocks of one step": Case(40, 100, 130, (64, 64)),
    "blocks of several steps": Case(20, 140, 150, (128, 128)),
    "wide and low": Case(9, 150, 37, (128, 16)),
    "narrow and high": Case(9, 37, 150, (16, 128)),
    "ragged by one": Case(65, 65, 33, (64, 32), "live"),
    "one element": Case(1, 1, 1, (32, 32), "live"),
    "one block": Case(3, 64, 512, (32, 64), "one"),
    "nothing lives": Case(20, 50, 70, (32, 32), "dead"),
    "no tokens": Case(0, 50, 70, (32, 32)),
}
FEW = ("merged blocks", "suspended blocks", "blocks of one step")
EACH = [(name, kind) for name in CASES for kind in TYPES if name in FEW or kind in ("float32", "bfloat16")]
TALL = [(16, "float32"), (32, "float16"), (64, "float32"), (64, "bfloat16"), (128, "bfloat16")]


def drawn(case: Case, kind: str) -> Operands:
    """Operands of a case in one of ``TYPES``."""
    dtype, precision = TYPES[kind]
    return operands(case._replace(dtype=dtype, precision=precision))


def check_products(module: ModuleType, o: Operands, processors: int = 64) -> None:
    """Forward with and without bias, and dgrad."""
    size = np.abs(o.exact_x) @ np.abs(o.exact_weight).T
    for bias, exact_bias in ((o.bias, o.exact_bias), (None, np.zeros(o.case.out))):
        y = module.forward(o.x, o.values, bias, processors=processors, **o.layer)
        exact = o.exact_x @ o.exact_weight.T + exact_bias
        assert_close("forward", o, y, exact, size + np.abs(exact_bias))
    dx = module.dgrad(o.dy, o.values, processors=processors, **o.layer)
    size = np.abs(o.exact_dy) @ np.abs(o.exact_weight)
    assert_close("dgrad", o, dx, o.exact_dy @ o.exact_weight, size)


def check_wgrad(module: ModuleType, o: Operands, processors: int = 4) -> tuple[Array, Array, int]:
    """wgrad, bitwise the same without the saliency epilogue; returns both and the workspace in bytes."""
    dvalues, wg, workspace = module.wgrad(o.dy, o.x, o.values, True, processors=processors, **o.layer)
    alone, none, _ = module.wgrad(o.dy, o.x, o.values, False, processors=processors, **o.layer)
    assert none is None and np.array_equal(dvalues.view(np.uint8), alone.view(np.uint8))
    exact, size = o.exact_dy.T @ o.exact_x, np.abs(o.exact_dy).T @ np.abs(o.exact_x)
    assert_close("wgrad", o, dvalues, by_slot(exact, o), by_slot(size, o))
    exact, size = (
        by_block(g * w, o).sum((2, 3)).ravel()
        for g, w in ((exact, o.exact_weight), (size, np.abs(o.exact_weight)))
    )
    assert_close("saliency", o, wg, exact, size)
    assert (wg[~o.mask.ravel()] == 0).all()
    return dvalues, wg, workspace


def check_probe(module: ModuleType, o: Operands) -> None:
    """Squared norms at dead blocks; zeros at live ones, and everywhere while the flag is down."""
    bo, bi = o.case.block
    on, off = (
        module.probe(o.dy, o.x, o.capacity, bi, bo, wanted, processors=4, **o.layer)
        for wanted in (True, False)
    )
    dead = ~o.mask.ravel()
    exact, size = (
        (by_block(g, o) ** 2).sum((2, 3)).ravel() * dead
        for g in (o.exact_dy.T @ o.exact_x, np.abs(o.exact_dy).T @ np.abs(o.exact_x))
    )
    # |g^2 - (g + d)^2| <= 2 |g| d + d^2, summed over a block by Cauchy-Schwarz.
    assert_close("probe", o, on, exact, 2 * np.sqrt(exact * size) + exact)
    assert (on[~dead] == 0).all() and (off == 0).all()


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_products(emulated: Emulated, name: str, kind: str) -> None:
    check_products(emulated("linear"), drawn(CASES[name], kind))


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_gradients(emulated: Emulated, name: str, kind: str) -> None:
    o = drawn(CASES[name], kind)
    _, _, workspace = check_wgrad(emulated("linear"), o)
    check_probe(emulated("linear"), o)
    assert workspace == 0


@pytest.mark.parametrize(("width", "kind"), TALL)
def test_tall_tiles(emulated: Emulated, width: int, kind: str) -> None:
    case = Case(130 if width == 16 else 70, width + 8, width + 8, (width, width), "live")
    check_products(emulated("linear"), drawn(case, kind), processors=1)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_sum_over_tokens_in_parts(emulated: Emulated, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    o = drawn(Case(450, 25, 150, (16, 16), "suspended"), kind)
    results = []
    for order in ("forward", "reverse"):  # of thread blocks: the bits do not depend on it
        monkeypatch.setenv("DYN_EMULATION_BLOCK_ORDER", order)
        dvalues, wg, workspace = check_wgrad(emulated("linear"), o, processors=64)
        assert workspace == 2 * 4 * o.values.size
        results.append(dvalues.tobytes() + wg.tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", TYPES)
def test_long_sums_are_as_exact_as_their_type(emulated: Emulated, kind: str) -> None:
    """Chained in a tensor core, which cuts sums off, those of float32 would be off by ten times as much."""
    module = emulated("linear")
    check_products(module, drawn(Case(48, 40, 1030, (32, 32), "live"), kind), processors=1)
    check_products(module, drawn(Case(48, 1030, 40, (16, 16), "live"), kind), processors=1)
    check_wgrad(module, drawn(Case(1030, 40, 48, (16, 16), "live"), kind), processors=1)


def test_no_slots(emulated: Emulated) -> None:
    o = operands(Case(5, 40, 50, (32, 32), "dead"))
    nothing = packed_index(o.mask, np.full(o.mask.shape, -1), 0)
    o = o._replace(capacity=0, values=o.values[:0], index=nothing)
    module = emulated("linear")
    y = module.forward(o.x, o.values, o.bias, **o.layer)
    assert (y == o.bias).all()
    dvalues, wg, _ = module.wgrad(o.dy, o.x, o.values, True, **o.layer)
    assert dvalues.shape == (0, 32, 32) and (wg == 0).all()


@pytest.mark.skipif(CHOSEN in os.environ, reason="sanitizers would report what is wrong on purpose")
@pytest.mark.parametrize("wait", [1, 2, 3])
@pytest.mark.parametrize("op", ["forward", "dgrad", "wgrad"])
def test_a_missing_wait_shows(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch, op: str, wait: int
) -> None:
    o = operands(Case(100, 96, 96, (32, 32), "live", "float16"))
    monkeypatch.setenv("DYN_EMULATION_WITHOUT", f"wait_copies:{wait}")
    module = emulated("linear")
    if op == "forward":
        result = module.forward(o.x, o.values, None, **o.layer)
    elif op == "dgrad":
        result = module.dgrad(o.dy, o.values, **o.layer)
    else:
        result = module.wgrad(o.dy, o.x, o.values, False, **o.layer)[0]
    assert np.isnan(result).any() == (wait <= {"forward": 2, "dgrad": 2, "wgrad": 4}[op])
