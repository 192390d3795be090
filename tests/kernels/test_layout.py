"""``BlockLayout`` against plain Python: random sequences of changes, every list after each, wrong input."""

from __future__ import annotations

import copy
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynaprune_kernels import BlockLayout, ConvGeometry, _extension, index_check, reference
from dynaprune_kernels.geometry import Block
from dynaprune_kernels.index import IndexSections, index_size
from tests.kernels.packed_index import packed_index, updated_slots

BACKENDS = ["reference", "cpu"]
CHANGES = ["update", "suspend", "resume", "release", "allocate", "compact", "restore", "drop"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that rebuilds the lists."""
    if request.param == "cpu" and not _extension.load().loaded:
        pytest.skip(str(_extension.load().reason))
    monkeypatch.setenv("DYNAPRUNE_BACKEND", request.param)
    return request.param


class Grid(NamedTuple):
    """A weight's sizes."""

    out: int
    inputs: int
    block: tuple[int, int]
    conv: ConvGeometry | None = None


GRIDS = {
    "square": Grid(64, 64, (16, 16)),
    "ragged": Grid(50, 37, (16, 16)),
    "rectangular": Grid(64, 96, (8, 32)),
    "one block": Grid(5, 3, (8, 8)),
    "one row": Grid(16, 100, (16, 8)),
    "large blocks": Grid(300, 257, (128, 128)),
    "conv 3x3": Grid(32, 24, (8, 8), ConvGeometry(3, 3, 1, 1, 1, 1)),
    "conv stride": Grid(24, 20, (8, 8), ConvGeometry(3, 3, 2, 2, 1, 1)),
    "conv phases": Grid(16, 16, (8, 8), ConvGeometry(5, 4, 3, 2, 0, 0, 2, 1)),
    "conv dilated": Grid(16, 24, (8, 16), ConvGeometry(3, 2, 2, 1, 0, 0, 3, 2)),
    "conv groups": Grid(48, 36, (8, 8), ConvGeometry(3, 3, 2, 1, 1, 1, groups=3)),
    "depthwise": Grid(32, 4, (8, 8), ConvGeometry(3, 3, 1, 1, 1, 1, groups=4)),
    "conv 1d": Grid(16, 16, (8, 8), ConvGeometry(1, 7, 1, 2, 0, 3)),
}


class Model:
    """The same state in plain Python, and which block each slot's content belongs to."""

    def __init__(self, grid: Grid, mask: np.ndarray, capacity: int) -> None:
        self.grid, self.capacity = grid, capacity
        self.mask, self.slots, self.dropped = updated_slots(mask, np.full(mask.shape, -1), capacity, True)

    def update(self, mask: np.ndarray, release: bool) -> None:
        self.mask, self.slots, self.dropped = updated_slots(mask, self.slots, self.capacity, release)

    def compact(self, capacity: int) -> list[int]:
        used = sorted(self.slots[self.slots >= 0].tolist())
        new = {old: i for i, old in enumerate(used)}
        self.slots = np.vectorize(lambda slot: new.get(slot, -1))(self.slots)
        self.capacity, self.dropped = capacity, 0
        return used + [-1] * (capacity - len(used))

    def restore(self, slots: np.ndarray, capacity: int) -> None:
        self.slots, self.mask, self.capacity, self.dropped = slots, slots >= 0, capacity, 0

    def drop(self, rows: np.ndarray, channels: np.ndarray) -> list[int]:
        block, conv = self.grid.block, self.grid.conv
        out = sum(min(block[0], self.grid.out - r * block[0]) for r in np.flatnonzero(~rows))
        inputs = sum(min(block[1], self.grid.inputs - c * block[1]) for c in np.flatnonzero(~channels))
        self.grid = Grid(out, inputs, block, conv)
        stay = np.ix_(~rows, np.tile(~channels, 1 if conv is None else conv.taps))
        self.mask, self.slots = self.mask[stay], self.slots[stay]
        return self.compact(min(self.capacity, self.mask.size))

    def index(self) -> np.ndarray:
        conv = self.grid.conv
        sizes: dict[str, Any] = {}
        if conv is not None:
            sizes = {
                "groups": conv.groups,
                "kernel": conv[0:2],
                "stride": conv[2:4],
                "dilation": conv[6:8],
            }
        return packed_index(self.mask, self.slots, self.capacity, overflow=self.dropped, **sizes)


def _layout(grid: Grid, **options: Any) -> BlockLayout:
    return BlockLayout(grid.out, grid.inputs, grid.block, conv=grid.conv, **options)


def _assert_same(layout: BlockLayout, model: Model, done: list[str]) -> None:
    message = f"after {done}"
    assert np.array_equal(layout.mask.numpy(), model.mask), message
    assert np.array_equal(layout.slot_of_block.numpy(), model.slots), message
    assert layout.capacity == model.capacity, message
    expected = model.index()
    difference = np.flatnonzero(layout.index.numpy() != expected)
    assert layout.index.shape == expected.shape and not difference.size, f"{message}: at {difference[:9]}"
    assert layout.live_count() == int((model.mask & (model.slots >= 0)).sum()), message


def _drawn(choose: random.Random, shape: tuple[int, ...]) -> np.ndarray:
    density = choose.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    return np.array([choose.random() < density for _ in range(shape[0] * shape[1])]).reshape(shape)


@pytest.mark.parametrize("name", GRIDS)
def test_random_sequences_of_changes(name: str, backend: str) -> None:
    grid = GRIDS[name]
    choose = random.Random(name)
    for round_ in range(6):
        shape = (_layout(grid).rows, _layout(grid).columns)
        blocks = shape[0] * shape[1]

        mask = _drawn(choose, shape)
        capacity = choose.randint(1, blocks)
        layout = _layout(grid, mask=torch.from_numpy(mask), capacity=capacity)
        model = Model(grid, mask, capacity)
        done = [f"round {round_}: start"]
        _assert_same(layout, model, done)
        for _ in range(12):
            change = choose.choice(CHANGES)
            done.append(change)
            other, release = _drawn(choose, model.mask.shape), choose.random() < 0.5
            if change == "update":
                layout.update_(torch.from_numpy(other), release=release)
                model.update(other, release)
            elif change == "suspend":
                layout.suspend_(torch.from_numpy(other))
                model.update(model.mask & ~other, False)
            elif change == "resume":
                layout.resume_()
                model.update(model.slots >= 0, False)
            elif change == "release":
                layout.release_(torch.from_numpy(other))
                model.update(model.mask & ~other, True)
            elif change == "allocate":
                layout.allocate_(torch.from_numpy(other))
                model.update(model.mask | other, True)
            elif change == "compact":
                capacity = choose.randint(max(1, int((model.slots >= 0).sum())), blocks)
                assert layout.compact_(capacity).tolist() == model.compact(capacity)
            elif change == "drop":
                if grid.conv is not None and grid.conv.groups > 1:
                    continue
                rows, columns = model.mask.shape
                sizes = rows, columns // (grid.conv.taps if grid.conv else 1)
                gone = [np.array([choose.random() < 0.15 for _ in range(size)]) for size in sizes]
                if gone[0].all() or gone[1].all():
                    continue
                assert layout.drop_(*map(torch.from_numpy, gone)).tolist() == model.drop(*gone)
                assert (layout.out_features, layout.in_features) == (model.grid.out, model.grid.inputs)
                blocks = model.mask.size
            else:
                saved, capacity = model.slots.copy(), model.capacity
                layout = _layout(model.grid)
                layout.restore_(torch.from_numpy(saved.astype(np.int32)), capacity)
                model.restore(saved, capacity)
            _assert_same(layout, model, done)


def test_suspended_blocks_keep_slot_and_come_back_and_the_last_ones_in_order_overflow(backend: str) -> None:
    layout = BlockLayout(16, 32, (8, 8), capacity=5, mask=torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]) > 0)
    before = layout.slot_of_block.clone()
    layout.suspend_(torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]]) > 0)
    assert layout.live_count() == 2 and torch.equal(layout.slot_of_block, before)
    layout.check()
    layout.resume_()
    assert layout.live_count() == 4 and torch.equal(layout.slot_of_block, before)
    layout.allocate_(torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0]]) > 0)
    assert layout.slot_of_block.tolist() == [[0, 1, -1, 4], [2, -1, -1, 3]]
    with pytest.raises(RuntimeError, match=r"2 blocks found no free slot \(capacity 5\)"):
        layout.check()
    layout.update_(layout.mask)
    layout.check()


def test_an_update_keeps_the_buffers_and_bumps_their_version(backend: str) -> None:
    layout = BlockLayout(32, 32, (8, 8))
    buffers = (layout.index, layout.mask, layout.slot_of_block)
    addresses = [buffer.data_ptr() for buffer in buffers]
    versions = [buffer._version for buffer in buffers]
    layout.update_(torch.rand(4, 4) < 0.5)
    assert [b.data_ptr() for b in (layout.index, layout.mask, layout.slot_of_block)] == addresses
    assert all(b._version > v for b, v in zip(buffers, versions, strict=True))


class _NoSync(TorchDispatchMode):
    """Refuses what would wait for a device: values read on the host, sizes that depend on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero", "equal.")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(f"aten::{name}" in func._schema.name + "." for name in self.REFUSED):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_reference_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_check, "readable", lambda tensor: False)  # what it is of a tensor on a GPU
    with pytest.raises(AssertionError, match="waits"), _NoSync():
        torch.ones(3).sum().item()
    for grid in GRIDS.values():
        layout = _layout(grid)
        mask = torch.rand(layout.rows, layout.columns) < 0.5
        values = torch.zeros(layout.capacity, grid.block[1], grid.block[0])
        with _NoSync():
            layout.mask.copy_(mask)
            reference.layout_update(
                layout.mask, layout.slot_of_block, layout.index, layout.capacity, grid.conv, True
            )
            reference.block_saliency(values, values, layout.index, layout.rows, layout.columns)


@pytest.mark.parametrize("name", GRIDS)
def test_the_ladder_descends_by_a_quarter_and_holds_what_lives(name: str) -> None:
    layout = _layout(GRIDS[name])
    seen = {layout.ladder_capacity(least) for least in range(layout.blocks + 1)}
    for least in range(1, layout.blocks + 1):
        capacity = layout.ladder_capacity(least)
        assert least <= capacity <= layout.blocks
        assert int(capacity * 0.75) < least, "a smaller rung would do"
    for larger, smaller in zip(sorted(seen)[1:], sorted(seen), strict=False):
        assert smaller == int(larger * 0.75)


def test_a_layout_is_copied_saved_and_moved_as_a_module() -> None:
    layout = BlockLayout(32, 32, (8, 8), mask=torch.rand(4, 4) < 0.6)
    twin = copy.deepcopy(layout)
    twin.update_(torch.zeros(4, 4, dtype=torch.bool))
    assert layout.live_count() > 0 == twin.live_count()
    assert set(layout.state_dict()) == {"slot_of_block"}
    assert layout.double().half().index.dtype == torch.int32
    assert repr(layout).startswith("BlockLayout(4x4 blocks of 8x8, capacity=")


def test_the_largest_grid_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(ValueError, match="at most 2147483647 blocks, got 65536 x 32768"):
        BlockLayout(8 * 65536, 8 * 32768, (8, 8))


LINEAR: dict[str, Any] = {"out_features": 32, "in_features": 32, "block": (8, 8)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block": (7, 8)}, ValueError, r"from 8 to 128, got \(7, 8\)"),
        ({"block": (8, 129)}, ValueError, r"from 8 to 128, got \(8, 129\)"),
        ({"block": (8.0, 8)}, TypeError, "int or a pair"),
        ({"block": (8, 8, 8)}, TypeError, "int or a pair"),
        ({"block": True}, TypeError, "int or a pair"),
        ({"out_features": 0}, ValueError, "at least one output and one input, got 0 and 32"),
        ({"capacity": 17}, ValueError, "capacity from 1 to 16 blocks, got 17"),
        ({"capacity": 0}, ValueError, "capacity from 1 to 16 blocks, got 0"),
        ({"mask": torch.ones(4, 4)}, TypeError, "bool mask, got torch.float32"),
        ({"mask": [[True]]}, TypeError, "bool mask, got list"),
        ({"mask": torch.ones(4, 3, dtype=torch.bool)}, ValueError, r"shape \(4, 4\), got \(4, 3\)"),
        ({"conv": ConvGeometry(3, 3, groups=3)}, ValueError, "divisible by groups=3"),
        ({"conv": ConvGeometry(3, 3, groups=8)}, ValueError, r"multiple of the .*outputs \(8\)"),
    ],
)
def test_wrong_layouts_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockLayout(**{**LINEAR, **options})


def _wrong_calls() -> dict[str, tuple[Any, type[Exception], str]]:
    ints = torch.zeros(4, 4, dtype=torch.int32)
    twice = torch.full((4, 4), -1, dtype=torch.int32)
    twice[0] = 3
    return {
        "float mask": (lambda la: la.update_(torch.ones(4, 4)), TypeError, "bool mask, got torch.float32"),
        "shape": (lambda la: la.update_(torch.ones(16) > 0), ValueError, r"\(4, 4\), got \(16,\)"),
        "device": (
            lambda la: la.update_(torch.ones(4, 4, dtype=torch.bool, device="meta")),
            ValueError,
            "on cpu, got meta",
        ),
        "suspend": (lambda la: la.suspend_(ints), TypeError, "bool mask, got torch.int32"),
        "compact": (lambda la: la.compact_(15), ValueError, "at least the 16 slots in use, got 15"),
        "capacity": (lambda la: la.compact_(0), ValueError, "capacity from 1 to 16 blocks, got 0"),
        "slots dtype": (lambda la: la.restore_(ints.long(), 16), TypeError, "int32 slots, got torch.int64"),
        "slots shape": (lambda la: la.restore_(ints[:3], 16), ValueError, r"\(4, 4\), got \(3, 4\)"),
        "slot twice": (lambda la: la.restore_(twice, 16), ValueError, "each slot once"),
        "slot negative": (lambda la: la.restore_(ints - 2, 16), ValueError, "each slot once"),
        "slot outside": (lambda la: la.restore_(ints + 16, 16), ValueError, "each slot once"),
    }


@pytest.mark.parametrize("name", _wrong_calls())
def test_wrong_changes_are_refused_and_change_nothing(name: str) -> None:
    call, error, message = _wrong_calls()[name]
    layout = BlockLayout(**LINEAR)
    before = [tensor.clone() for tensor in (layout.mask, layout.slot_of_block, layout.index)]
    with pytest.raises(error, match=message):
        call(layout)
    after: list[Tensor] = [layout.mask, layout.slot_of_block, layout.index]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)) and layout.capacity == 16


def test_the_packed_index_has_the_documented_size() -> None:
    for grid in GRIDS.values():
        layout = _layout(grid, capacity=1)
        lists = layout.columns
        if grid.conv is not None:
            channel_blocks = layout.columns // grid.conv.taps
            lists = grid.conv.groups * channel_blocks * grid.conv.phases
        assert layout.index.numel() == 8 + (layout.rows + 1) + (lists + 1) + 6 + layout.rows + lists
        assert layout.index.numel() == index_size(layout.rows, lists, 1)


def test_a_stale_graph_is_refused_not_silently_wrong(backend: str) -> None:
    layout = BlockLayout(16, 16, (8, 8))
    values = nn.Parameter(torch.randn(4, 8, 8))
    y = torch.ops.dynaprune.block_sparse_linear(torch.randn(3, 16), values, None, layout.index, 16)
    layout.update_(torch.eye(2) > 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_mask_of_other_strides_is_the_same_mask() -> None:
    mask = torch.rand(6, 4) < 0.5
    layout = BlockLayout(64, 96, 16, mask=mask.t())
    assert layout.mask.is_contiguous() and layout.slot_of_block.is_contiguous()
    assert torch.equal(layout.index, BlockLayout(64, 96, 16, mask=mask.t().contiguous()).index)


@pytest.mark.parametrize("section", IndexSections._fields)
def test_check_notices_an_index_that_something_else_wrote_to(backend: str, section: str) -> None:
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    layout = BlockLayout(32, 48, (8, 8), capacity=20, mask=mask)
    layout.check()
    getattr(layout.lists, section).data[0] += 1
    with pytest.raises(RuntimeError, match="the layout is corrupted"):
        layout.check()
    layout.update_(layout.mask)
    layout.check()


def test_check_notices_a_mask_that_is_not_the_index_s(backend: str) -> None:
    layout = BlockLayout(32, 48, (8, 8))
    layout.mask.data[1, 2] = False
    with pytest.raises(RuntimeError, match="the layout is corrupted"):
        layout.check()


@pytest.mark.parametrize("name", GRIDS)
def test_sizes_of_a_layout(name: str) -> None:
    grid = GRIDS[name]
    layout = _layout(grid)
    conv = grid.conv or ConvGeometry(1, 1)
    assert (layout.taps, layout.groups) == (conv.kernel_h * conv.kernel_w, conv.groups)
    shape = (grid.out, grid.inputs // conv.groups)
    assert layout.dense_shape == torch.Size(shape if grid.conv is None else (*shape, *conv[0:2]))
    assert layout.block == grid.block and str(layout.block) == str(grid.block)
    assert (layout.block.outputs, layout.block.inputs) == grid.block
    values = torch.zeros(layout.capacity, layout.block.inputs, layout.block.outputs)
    assert Block.of(values) == layout.block
    blocks = reference.dense_to_blocks(torch.zeros(layout.dense_shape), layout.block, grid.conv)
    assert blocks.shape == (layout.blocks, *values.shape[1:])


def test_blocks_by_their_slots() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]]) > 0
    layout = BlockLayout(16, 24, (8, 8), mask=mask, capacity=5)
    assert layout.block_of_slot.tolist() == [0, 2, 4, -1, -1]
    layout.suspend_(torch.tensor([[0, 0, 1], [0, 0, 0]]) > 0)
    assert layout.slots_of(layout.mask).tolist() == [True, False, True, False, False]
    assert layout.slots_of(~layout.mask).tolist() == [False, True, False, False, False]
    numbers = torch.arange(1.0, 7).view(6, 1, 1).expand(6, 8, 8)
    assert layout.by_slot(numbers)[:, 7, 7].tolist() == [1, 3, 5, 0, 0]
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(6,\)"):
        layout.slots_of(torch.ones(6, dtype=torch.bool))


def _change(layout: BlockLayout, change: str) -> None:
    if change == "drop":
        layout.drop_(torch.tensor([True, False, False]), torch.tensor([False, True, False, False]))
    elif change == "compact":
        layout.compact_(int((layout.slot_of_block >= 0).sum()))
    elif change == "update":
        layout.update_(~layout.mask)
    else:
        layout.restore_(torch.arange(12, dtype=torch.int32).view(3, 4), 12)


@pytest.mark.parametrize("changes", [(), ("drop",), ("update", "drop"), ("compact", "update"), ("restore",)])
def test_a_snapshot_brings_back_sizes_tensors_and_numbers(backend: str, changes: tuple[str, ...]) -> None:
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    layout = BlockLayout(20, 30, (8, 8), mask=mask, capacity=10)
    twin = copy.deepcopy(layout)
    tensors = (layout.mask, layout.slot_of_block, layout.index)
    versions = [tensor._version for tensor in tensors]

    snapshot = layout.snapshot()
    for change in changes:
        _change(layout, change)
        with pytest.raises(AssertionError):
            _assert_as(layout, twin)
    layout.rollback_(snapshot)

    _assert_as(layout, twin)
    layout.check()
    back = (layout.mask, layout.slot_of_block, layout.index)
    assert all(one is other for one, other in zip(back, tensors, strict=True))
    if changes in ((), ("drop",)):
        assert [tensor._version for tensor in back] == versions


def _assert_as(layout: BlockLayout, other: BlockLayout) -> None:
    for name in ("out_features", "in_features", "rows", "columns", "blocks", "capacity", "dense_shape"):
        assert getattr(layout, name) == getattr(other, name), name
    for name in ("mask", "slot_of_block", "index"):
        assert torch.equal(getattr(layout, name), getattr(other, name)), name


def test_a_snapshot_of_a_layout_on_meta_brings_back_its_known_slots() -> None:
    layout = BlockLayout(16, 16, (8, 8), mask=torch.eye(2) > 0).to("meta")
    snapshot = layout.snapshot()
    layout.restore_(torch.arange(4, dtype=torch.int32).view(2, 2), 4)
    assert layout.known_slots.tolist() == [[0, 1], [2, 3]] and layout.capacity == 4
    layout.rollback_(snapshot)
    assert layout.known_slots.tolist() == [[0, -1], [-1, 1]] and layout.capacity == 2


def test_a_layout_pickled_with_a_plain_pair_has_a_block() -> None:
    layout = BlockLayout(16, 32, (8, 16))
    state = {**layout.__dict__, "block": (8, 16)}
    old = BlockLayout.__new__(BlockLayout)
    old.__setstate__(state)
    assert old.block.outputs == 8 and old.block.inputs == 16
