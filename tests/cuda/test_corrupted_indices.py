"""Whatever an index holds, no kernel leaves its memory, loops without end or waits for ever.

Memory is watched where test_sanitizers.py runs this file under AddressSanitizer; without it, crashes and
deadlocks show, and what the products make of a wrong index: blocks that the guards let pass, nothing else.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.cuda import conv2d_cases, linear_cases
from tests.cuda.conv2d_cases import Case as Conv
from tests.cuda.corrupted_indices import Array, Layout, corrupted_indices
from tests.cuda.emulation import CHOSEN, as_dtype, as_float64
from tests.cuda.linear_cases import Case as Linear
from tests.cuda.linear_cases import assert_close
from tests.kernels.packed_index import packed_index, updated_slots

pytestmark = pytest.mark.gpu_offline

Emulated = Callable[[str], ModuleType]

# Blocks that wgrad takes one by one and eight at a time, lists of several, suspended ones; a sum in parts.
LINEAR = {
    "merged": (Linear(3, 40, 56, (16, 16), "suspended", "bfloat16"), 120),
    "one by one": (Linear(3, 40, 300, (16, 128), "suspended", "bfloat16"), 80),
    "split": (Linear(450, 20, 40, (16, 16), "live", "bfloat16"), 20),
}
CONV2D = {
    "strided": (
        Conv(1, 32, 36, (3, 4), (16, 16), (2, 2), (2, 1), mask="suspended", dtype="bfloat16", processors=64),
        100,
    ),
    "groups": (
        Conv(1, 64, 64, (3, 3), (32, 32), (1, 2), padding=(0, 1), groups=2, mask="random", processors=64),
        40,
    ),
}
LINEAR_SM90 = {
    "low": (Linear(3, 130, 200, (64, 64), "suspended", "bfloat16"), 60),
    "high": (Linear(3, 200, 300, (128, 128), "suspended", "float16"), 20),
    "split": (Linear(600, 64, 64, (64, 64), "live", "float16"), 10),
}
CONV2D_SM90 = {
    "strided": (Conv(1, 64, 72, (3, 3), (64, 64), (2, 2), (2, 1), mask="suspended"), 60),
    "groups": (Conv(1, 128, 128, (2, 3), (64, 64), (1, 2), padding=(0, 1), groups=2), 20),
}


SALIENCY = {"one warp each": ((16, 16), 120), "all warps": ((64, 64), 50)}


@functools.cache
def operands() -> dict[str, tuple[Any, int]]:
    """Operands of every case by test and name, and how many corruptions of its index are tried."""
    cases = {
        f"{test}, {name}": (module.operands(case), count)
        for test, module, named in [
            ("linear", linear_cases, LINEAR),
            ("linear_sm90", linear_cases, LINEAR_SM90),
            ("conv2d", conv2d_cases, CONV2D),
            ("conv2d_sm90", conv2d_cases, CONV2D_SM90),
        ]
        for name, (case, count) in named.items()
    }
    for name, ((bi, bo), count) in SALIENCY.items():
        case = Linear(0, 3 * bo, 4 * bi, (bo, bi), "suspended")
        cases[f"saliency, {name}"] = (linear_cases.operands(case), count)
    return cases


@functools.cache
def indices() -> dict[str, tuple[list[str], Array]]:
    """The corruptions of every case: kinds and indices."""
    layouts = {}
    for name, (o, count) in operands().items():
        c = o.case
        conv = (*c.kernel, *c.stride, *c.padding, *c.dilation, c.groups) if isinstance(c, Conv) else ()
        layouts[name] = Layout(o.mask, o.slots, o.capacity, o.index, count, conv)
    return corrupted_indices(layouts)


def corruptions(op: str, name: str) -> tuple[Any, Iterator[tuple[int, str, Array]]]:
    """Operands of a case, and number, kind and index of each corruption; of every third without a sanitizer.

    There are numbers in every slot and in all padding: corruption may list any slot.
    """
    label = f"{op}, {name}"
    o, _ = operands()[label]
    kinds, corrupted = indices()[label]
    drawn = np.random.default_rng(1).standard_normal(o.values.shape)
    o = o._replace(values=as_dtype(drawn, o.case.dtype))
    every = 1 if CHOSEN in os.environ else 3
    numbers = range(0, len(kinds), every)
    return o, zip(numbers, kinds[::every], corrupted[::every], strict=True)


class Lists:
    """The lists of one direction as the kernels read an index of a linear layer."""

    def __init__(self, index: Array, o: linear_cases.Operands, by_row: bool) -> None:
        (rows, columns), c = o.mask.shape, o.capacity
        sizes = [8, c, rows + 1, c, c, columns + 1, c, c, c, rows, columns]
        parts = np.split(index, np.cumsum(sizes)[:-1])
        pointers, blocks, slots, order = (parts[k] for k in ((2, 3, 4, 9) if by_row else (5, 6, 8, 10)))
        most = columns if by_row else rows
        count = rows if by_row else columns
        named = [int(order[rank]) if 0 <= order[rank] < count else rank for rank in range(count)]
        self.entries: dict[int, list[tuple[int, int]]] = {}  # of each list that is worked on: block, slot
        for number in set(named):
            begin, end = int(pointers[number]), int(pointers[number + 1])
            inside = 0 <= begin <= end <= c
            pairs = zip(blocks[begin:end].tolist(), slots[begin:end].tolist(), strict=True) if inside else ()
            self.entries[number] = [(b, s) for b, s in pairs if 0 <= b < most and 0 <= s < c]


def check_products(o: linear_cases.Operands, index: Array, results: dict[str, Array], label: str) -> None:
    """Each list that is worked on is the sum over its blocks that exist."""
    values, (bo, bi) = as_float64(o.values), o.case.block
    for op, result in results.items():
        forward = op == "forward"
        outer, inner = (bo, bi) if forward else (bi, bo)
        a = o.exact_x if forward else o.exact_dy
        padded = np.pad(a, [(0, 0), (0, -a.shape[1] % inner)])
        for number, entries in Lists(index, o, forward).entries.items():
            part = result[:, number * outer : (number + 1) * outer]
            exact = np.zeros((len(a), outer))
            size = np.zeros_like(exact)
            for block, slot in entries:
                left = padded[:, block * inner : (block + 1) * inner]
                # A block's padding, beyond the layer's inputs (dgrad: outputs), is not read.
                real = min(inner, a.shape[1] - block * inner)
                right = values[slot] if forward else values[slot].T
                exact += left[:, :real] @ right[:real]
                size += np.abs(left[:, :real]) @ np.abs(right[:real])
            if forward:
                bias = o.exact_bias[number * outer : (number + 1) * outer]
                exact[:, : len(bias)] += bias
            width = part.shape[1]
            assert_close(f"{op} {label}", o, part, exact[:, :width], size[:, :width] + abs(exact[:, :width]))


@pytest.mark.parametrize("op", ["linear"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear(emulated: Emulated, op: str, name: str) -> None:
    module, (o, corrupted) = emulated(op), corruptions(op, name)
    (bo, bi), processors = o.case.block, 64 if name == "split" else 4
    for number, kind, index in corrupted:
        layer = o.layer | {"index": index, "processors": processors}
        turn = 2 if name == "split" else number // 14 % 4
        label = f"{name}, {kind} {number}"
        if turn == 0:
            check_products(o, index, {"forward": module.forward(o.x, o.values, o.bias, **layer)}, label)
        elif turn == 1:
            check_products(o, index, {"dgrad": module.dgrad(o.dy, o.values, **layer)}, label)
        elif turn == 2:
            module.wgrad(o.dy, o.x, o.values, number % 2 == 0, **layer)
        else:
            module.probe(o.dy, o.x, o.capacity, bi, bo, True, **layer)


@pytest.mark.parametrize("op", ["linear"])
def test_chunks_that_negative_pointers_lead_to_are_empty(emulated: Emulated, op: str) -> None:
    """The bisection then ends behind the program's own row, and counts back to before the lists."""
    o = linear_cases.operands(Linear(3, 640, 16, (16, 16), "random", "bfloat16"))
    rows, index = o.mask.shape[0], o.index.copy()
    index[8 + o.capacity : 8 + o.capacity + rows + 1] = -(2**20)  # the row pointers
    layer = o.layer | {"index": index, "processors": 4}
    dvalues, *_ = emulated(op).wgrad(o.dy, o.x, o.values, False, **layer)
    written = as_float64(dvalues)
    assert not written[np.isfinite(written)].any()  # the rest is as poisoned as it was


@pytest.mark.parametrize("op", ["linear_sm90"])
@pytest.mark.parametrize("name", LINEAR_SM90)
def test_linear_on_hopper(emulated: Emulated, op: str, name: str) -> None:
    module, (o, corrupted) = emulated(op), corruptions(op, name)
    (bo, bi), sizes = o.case.block, (o.case.inputs, o.case.out, 4)
    for number, kind, index in corrupted:
        turn = 2 if name == "split" else number // 14 % 3
        label = f"{name}, {kind} {number}"
        if turn == 0:
            check_products(o, index, {"forward": module.forward(o.x, o.values, o.bias, index, *sizes)}, label)
        elif turn == 1:
            check_products(o, index, {"dgrad": module.dgrad(o.dy, o.values, index, *sizes)}, label)
        else:
            values = o.values if number % 2 == 0 else None
            module.wgrad(o.dy, o.x, values, index, o.capacity, bi, bo, *sizes)


def run_convolution(conv: Any, o: conv2d_cases.Operands, number: int, ops: int) -> None:
    """One of the first ``ops`` ops, by turns."""
    turn = number // 14 % ops
    if turn == 0:
        conv.forward(o.x, o.values, o.bias)
    elif turn == 1:
        conv.dgrad(o.dy, o.values)
    elif turn == 2:
        conv.wgrad(o.dy, o.x, o.values if number % 2 == 0 else None)
    else:
        conv.probe(o.dy, o.x, True)


@pytest.mark.parametrize("op", ["conv2d"])
@pytest.mark.parametrize("name", CONV2D)
def test_conv2d(emulated: Emulated, op: str, name: str) -> None:
    o, corrupted = corruptions(op, name)
    for number, _, index in corrupted:
        conv = emulated(op).Conv2d(o.case.shape, index, o.grid, False, o.case.processors)
        run_convolution(conv, o, number, 4)


@pytest.mark.parametrize("op", ["conv2d_sm90"])
@pytest.mark.parametrize("name", CONV2D_SM90)
def test_conv2d_on_hopper(emulated: Emulated, op: str, name: str) -> None:
    o, corrupted = corruptions(op, name)
    for number, _, index in corrupted:
        run_convolution(emulated(op).Conv2d(o.case.shape, index, o.grid, o.case.processors), o, number, 3)


@pytest.mark.parametrize("op", ["saliency"])
@pytest.mark.parametrize("name", SALIENCY)
def test_saliency(emulated: Emulated, op: str, name: str) -> None:
    o, corrupted = corruptions(op, name)
    gradient = o.values[::-1]
    for _, _, index in corrupted:
        emulated(op).block_saliency(o.values, gradient, index, *o.mask.shape, o.mask.shape[1])


def wrong_slots(slots: Array, capacity: int, random: np.random.Generator) -> Array:
    """Some of ``slot_of_block`` replaced by anything, bounds, other blocks' slots; or all by one slot."""
    wrong = slots.copy()
    if random.random() < 0.2:
        wrong[:] = random.integers(0, capacity)
    for _ in range(random.choice([0, 1, 2, 20])):
        near = [-(2**31), -2, -1, 0, capacity - 1, capacity, 2**31 - 1]
        near += [int(random.integers(-(2**31), 2**31)), *random.integers(0, capacity, 5).tolist()]
        wrong[tuple(random.integers(0, wrong.shape))] = random.choice(near)
    return wrong


def expected_faults(mask: Array, slots: Array, capacity: int, release: bool) -> int:
    """Numbers that are no slots, and blocks beyond one that share a slot."""
    held = slots[(slots != -1) & ~((slots >= 0) & ~mask & release)]
    right = held[(held >= 0) & (held < capacity)]
    return held.size - np.unique(right).size


@pytest.mark.parametrize("op", ["layout_update"])
@pytest.mark.parametrize("conv", [(), (1, 3, 1, 2, 0, 1, 1, 1, 2)], ids=["linear", "conv2d"])
def test_layout_update(emulated: Emulated, op: str, conv: tuple[int, ...]) -> None:
    random = np.random.default_rng(len(conv))
    rows, columns, sizes = 6, 12, (conv[8], *conv[:4], *conv[6:8]) if conv else (1,) * 7
    lists = sizes[0] * columns // (sizes[1] * sizes[2]) * sizes[3] * sizes[4]
    for number in range(60 if CHOSEN in os.environ else 20):
        capacity = int(random.integers(1, rows * columns // random.choice([1, 6]) + 1))
        slots = np.full(rows * columns, -1, np.int32)
        used = int(random.integers(0, capacity + 1))
        slots[random.permutation(rows * columns)[:used]] = random.permutation(capacity)[:used]
        slots = wrong_slots(slots.reshape(rows, columns), capacity, random)
        bytes_ = random.integers(0, 256, slots.shape, dtype=np.uint8) * (random.random(slots.shape) < 0.5)
        release = bool(number % 2)
        live = bytes_ != 0
        faults = expected_faults(live, slots, capacity, release)
        index = np.zeros(8 + rows + 1 + lists + 1 + 6 * capacity + rows + lists, np.int32)
        mask, after = bytes_.astype(np.uint8).view(bool), slots.copy()
        emulated(op).layout_update(mask, after, index, capacity, sizes, release)
        assert np.isin(mask.view(np.uint8), (0, 1)).all() and ((after >= -1) & (after < capacity)).all()
        assert index[3] == faults
        if faults == 0:
            live, slots, dropped = updated_slots(live, slots, capacity, release)
            geometry = {"groups": sizes[0], "kernel": sizes[1:3], "stride": sizes[3:5], "dilation": sizes[5:]}
            expected = packed_index(live, slots, capacity, overflow=dropped, **geometry)
            assert (mask == live).all() and (after == slots).all() and (index == expected).all()
