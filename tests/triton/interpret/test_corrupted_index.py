"""Whatever an index, a mask or slots hold, no kernel leaves its tensors or loops without end.

What a wrong number spoils counts as absent. The tests at the end leave one comparison out and notice it.
"""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dynaprune_kernels import BlockLayout, ConvGeometry
from dynaprune_kernels.backends import triton as kernels
from dynaprune_kernels.backends.triton import config
from dynaprune_kernels.backends.triton.config import Tile
from dynaprune_kernels.index import sections
from tests.cuda.test_corrupted_indices import expected_faults, wrong_slots
from tests.fuzz.corruptions import CORRUPTIONS, INT_MAX, INT_MIN, corrupted
from tests.fuzz.kernel_problems import Problem
from tests.kernels.packed_index import packed_index, updated_slots
from tests.triton.interpret.guarded_memory import guarded
from tests.triton.parity import Case, Operands, operands

pytestmark = pytest.mark.interpret

HALF = torch.float16
MERGED, CUT, DESCRIPTORS = Tile(16, 64, 4, 3), Tile(16, 16, 4, 3), Tile(16, 32, 4, 3, tma=True)
STRIDED = ConvGeometry(3, 2, 2, 1, 1, 0)
GROUPS = ConvGeometry(1, 2, 1, 1, 0, 1, 1, 1, 2)
# Steps of several blocks, of one, of a part of one; descriptors; ragged sizes; sums in parts, as many as
# the last number says.
CASES = {
    "merged": (Case(40, 56, (16, 16), "suspended", 3), MERGED, 1),
    "cut": (Case(64, 96, (32, 32), "cross", 5, HALF), CUT, 1),
    "descriptors": (Case(64, 96, (32, 32), "random", 5, HALF), DESCRIPTORS, 1),
    "ragged": (Case(17, 70, (32, 16), "live", 2, spare_slots=0), CUT, 1),
    "dead": (Case(40, 70, (16, 32), "dead", 2), MERGED, 1),
    "parts": (Case(20, 40, (16, 16), "live", 50), MERGED, 3),
    "strided": (Case(20, 36, (16, 16), "suspended", 1, conv=STRIDED, size=(5, 3)), MERGED, 1),
    "groups": (Case(64, 64, (32, 32), "random", 1, HALF, GROUPS, (2, 3)), CUT, 1),
    "parts of pixels": (Case(16, 16, (16, 16), "live", 2, conv=STRIDED, size=(6, 5)), CUT, 2),
}
KINDS = [kind for kind in CORRUPTIONS if kind not in ("other_length", "other_tensor")]  # refused by launchers
CORRUPTIONS_OF_EACH = 20  # case, by turns of its ops


def drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Case, Operands]:
    """A case's operands, of a seed and with numbers in every slot; its tile and parts are in use."""
    case, tile, parts = CASES[name]
    monkeypatch.setattr(config, "tile", lambda problem, device: tile)
    monkeypatch.setattr(config, "splits", lambda programs, steps, device: parts)
    torch.manual_seed(len(name))
    o = operands(case, "cpu")
    return case, o._replace(values=torch.randn_like(o.values))


def corruptions(layout: BlockLayout, seed: str) -> Iterator[tuple[str, Tensor]]:
    """Kinds and corrupted indices."""
    empty = [torch.empty(0)] * 5
    slots = layout.slot_of_block.numpy()
    of = (layout.conv, 0, 0, (0, 0), layout.mask.numpy(), slots, layout.capacity, layout.index, *empty)
    for number in range(CORRUPTIONS_OF_EACH):
        kind = KINDS[number % len(KINDS)]
        yield f"{kind} {number}", corrupted(Problem(*of), kind, random.Random(f"{seed}/{number}"))


def calls(case: Case, o: Operands) -> dict[str, Callable[[Tensor], Any]]:
    """The ops of a layer, of an index."""
    conv, block, c = case.conv, o.layout.block, o.layout.capacity
    rows, columns, flag = o.layout.rows, o.layout.columns, torch.tensor(True)
    saliency = {"saliency": lambda i: kernels.block_saliency(o.values, o.clean, i, rows, columns)}
    if conv is None:
        return {
            "wgrad": lambda i: kernels.linear_wgrad(o.dy, o.x, i, c, block),
            "wgrad_saliency": lambda i: kernels.linear_wgrad_saliency(o.dy, o.x, o.values, i),
            "forward": lambda i: kernels.linear_forward(o.x, o.values, o.bias, i, case.out),
            "dgrad": lambda i: kernels.linear_dgrad(o.dy, o.values, i, case.inputs),
            "probe": lambda i: kernels.linear_probe(o.dy, o.x, i, c, block, flag),
        } | saliency
    size = list(o.x.shape)
    return {
        "wgrad": lambda i: kernels.conv2d_wgrad(o.dy, o.x, i, c, block, conv),
        "wgrad_saliency": lambda i: kernels.conv2d_wgrad_saliency(o.dy, o.x, o.values, i, conv),
        "forward": lambda i: kernels.conv2d_forward(o.x, o.values, o.bias, i, case.out, conv),
        "dgrad": lambda i: kernels.conv2d_dgrad(o.dy, o.values, i, size, conv),
        "probe": lambda i: kernels.conv2d_probe(o.dy, o.x, i, c, block, conv, flag),
    } | saliency


@pytest.mark.parametrize("name", CASES)
def test_no_access_leaves_its_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, o = drawn(name, monkeypatch)
    ops = calls(case, o)
    turns = list(ops)[:2] if name.startswith("parts") else list(ops)
    for number, (label, index) in enumerate(corruptions(o.layout, name)):
        op, before = turns[(number + len(name)) % len(turns)], index.clone()
        with guarded() as memory:
            try:
                ops[op](index)
            except Exception as error:
                raise AssertionError(f"{name} {op}: {label}: {error}") from error
        assert memory.accesses
        assert torch.equal(index, before), f"{name} {op}: {label}: the kernel wrote to the index"


@pytest.mark.parametrize("name", ["merged", "descriptors", "strided", "groups"])
def test_a_block_of_a_wrong_number_is_absent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, o = drawn(name, monkeypatch)
    layout, of, last = o.layout, calls(case, o), o.layout.live_count() - 1
    bounds = {"slots": layout.capacity, "cols": layout.columns, "rows": layout.rows}
    wrong = itertools.cycle([-1, INT_MIN, INT_MAX])
    for op, lists in (("forward", "row"), ("dgrad", "col"), ("wgrad", "row")):
        slot = int(getattr(layout.lists, f"{lists}_slots")[last])
        kept = o.values[slot].clone()
        if op != "wgrad":
            o.values[slot] = 0.0
        exact = of[op](layout.index)
        o.values[slot] = kept
        if op == "wgrad":
            exact[slot] = 0.0
        for what in ("slots", "cols", "rows") if op == "dgrad" else ("slots", "cols"):
            if case.conv is None and (op, what) == ("dgrad", "cols"):
                continue  # not read
            for number in (bounds[what], next(wrong)):
                index = layout.index.clone()
                getattr(sections(index, layout.rows, layout.capacity), f"{lists}_{what}")[last] = number
                assert torch.equal(of[op](index), exact), f"{op} with {what}[{last}] = {number}"


def test_chunks_that_negative_pointers_lead_to_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bisection then ends behind the program's own chunk: nothing may begin before the lists do."""
    case, o = drawn("merged", monkeypatch)
    index = o.layout.index.clone()
    sections(index, o.layout.rows, o.layout.capacity).row_ptr.fill_(-(2**20))
    with guarded():
        dw = calls(case, o)["wgrad"](index)
    assert torch.equal(dw, torch.zeros_like(dw))


@pytest.mark.parametrize("conv", [None, ConvGeometry(1, 3, 1, 2, 0, 1, 1, 1, 2)], ids=["linear", "conv2d"])
def test_layout_update_of_wrong_slots(conv: ConvGeometry | None) -> None:
    draw = np.random.default_rng(0 if conv is None else 1)
    rows, columns, g = 6, 12, conv or ConvGeometry(1, 1)
    lists = g.groups * columns // g.taps * g.phases
    right = 0
    for number in range(6):
        capacity = int(draw.integers(1, rows * columns // draw.choice([1, 6]) + 1))
        slots = np.full(rows * columns, -1, np.int32)
        used = int(draw.integers(0, capacity + 1))
        slots[draw.permutation(rows * columns)[:used]] = draw.permutation(capacity)[:used]
        slots = wrong_slots(slots.reshape(rows, columns), capacity, draw)
        numbers = draw.integers(0, 256, slots.shape, dtype=np.uint8) * (draw.random(slots.shape) < 0.5)
        live, release = numbers != 0, bool(number % 2)
        faults = expected_faults(live, slots, capacity, release)
        mask, after = torch.from_numpy(numbers.astype(np.uint8)).view(torch.bool), torch.tensor(slots)
        index = torch.zeros(10 + 6 * capacity + 2 * rows + 2 * lists, dtype=torch.int32)
        with guarded():
            kernels.layout_update(mask, after, index, capacity, conv, release)
        assert mask.view(torch.uint8).max() <= 1 and ((after >= -1) & (after < capacity)).all()
        assert index[3] == faults
        if faults == 0:
            right += 1
            live, slots, dropped = updated_slots(live, slots, capacity, release)
            geometry = {"groups": g.groups, "kernel": g[:2], "stride": g[2:4], "dilation": g[6:8]}
            expected = packed_index(live, slots, capacity, overflow=dropped, **geometry)
            assert (mask.numpy() == live).all() and (after.numpy() == slots).all()
            assert (index.numpy() == expected).all()
    assert 0 < right < 6


OUTSIDE = r"outside of tensor|away from its tensor"
MODULES = [
    importlib.import_module(f"dynaprune_kernels.backends.triton.kernels.{name}")
    for name in (
        "conv2d_product", "conv2d_wgrad", "layout_update", "linear_product", "linear_wgrad", "packed_index",
        "saliency", "weight_gradient",
    )
]  # fmt: skip


def leave_out(monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    """Let every comparison with this bound be true."""
    original = MODULES[5].below  # type: ignore[attr-defined]

    def compared(number: Any, limit: Any) -> Any:
        result = original(number, limit)
        return result | True if int(limit.handle.data.flat[0]) == bound else result

    for module in MODULES:
        if hasattr(module, "below"):
            monkeypatch.setattr(module, "below", compared)


# Op, the section that is overwritten, and which bound is left out then.
COMPARISONS = [
    ("forward", "row_slots", "capacity"),
    ("forward", "row_cols", "columns"),
    ("forward", "row_order", "rows"),
    ("dgrad", "col_rows", "rows"),
    ("wgrad", "row_slots", "capacity"),
    ("wgrad", "row_cols", "columns"),
    ("wgrad_saliency", "row_cols", "columns"),
    ("saliency", "row_slots", "capacity"),
    ("saliency", "block_of_slot", "blocks"),
]


@pytest.mark.parametrize(("op", "section", "bound"), COMPARISONS)
@pytest.mark.parametrize("name", ["merged", "strided"])
def test_a_comparison_left_out_is_noticed(
    name: str, op: str, section: str, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, o = drawn(name, monkeypatch)
    if case.conv is not None and section == "row_cols" and op != "wgrad_saliency":
        pytest.skip("what a wrong tap reads lies outside of the image, which is compared, too")
    layout, index = o.layout, o.layout.index.clone()
    getattr(sections(index, layout.rows, layout.capacity), section).fill_(-(2**20))
    run = calls(case, o)[op]
    with guarded():
        leave_out(monkeypatch, getattr(layout, bound))
        with pytest.raises(Exception, match=OUTSIDE):
            run(index)


@pytest.mark.parametrize("op", ["forward", "dgrad", "probe", "saliency"])
@pytest.mark.parametrize("name", ["merged", "strided"])
def test_pointers_that_nothing_compares_are_noticed(
    name: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, o = drawn(name, monkeypatch)
    index = o.layout.index.clone()
    lists = sections(index, o.layout.rows, o.layout.capacity)
    for pointers in (lists.row_ptr, lists.col_ptr):
        pointers.copy_(torch.arange(pointers.numel()) * 2**20)
    with guarded():
        for module in MODULES:
            if hasattr(module, "end_of_list"):
                monkeypatch.setattr(module, "end_of_list", lambda begin, end, capacity: end)
        with pytest.raises(Exception, match=OUTSIDE):
            calls(case, o)[op](index)


@pytest.mark.parametrize("slot", [1, 2**20], ids=["of all blocks", "that is none"])
def test_slots_that_nothing_compares_are_noticed(slot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def update() -> None:
        layout = BlockLayout(64, 64, 16, capacity=2, mask=torch.zeros(4, 4, dtype=torch.bool))
        tensors = [torch.ones(4, 4, dtype=torch.bool), torch.full((4, 4), slot, dtype=torch.int32)]
        kernels.layout_update(*tensors, layout.index, 2, None, False)

    with guarded():
        update()
        leave_out(monkeypatch, 2)
        with pytest.raises(Exception, match="outside of tensor"):
            update()


def test_a_loop_without_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, o = drawn("merged", monkeypatch)
    monkeypatch.setattr("tests.triton.interpret.guarded_memory.MOST_ACCESSES", 3)
    with guarded(), pytest.raises(Exception, match="more than 3 accesses"):
        calls(case, o)["forward"](o.layout.index)
