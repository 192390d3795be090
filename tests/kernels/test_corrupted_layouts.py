"""Indices, slots, masks and storages that something else wrote to: a clear error, or a right result."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynaprune_kernels import BlockLayout, ConvGeometry, _extension, index_check, reference
from dynaprune_kernels.index import sections
from tests.kernels.packed_index import packed_index, updated_slots

CONV = ConvGeometry(2, 3, 2, 1, 0, 1)


@pytest.fixture(params=["cpu", "reference", "dense"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and not _extension.load().loaded:
        pytest.skip(str(_extension.load().reason))
    monkeypatch.setenv("DYNAPRUNE_BACKEND", request.param)
    return request.param


def layout_of(conv: ConvGeometry | None) -> BlockLayout:
    """Three suspended and some dead blocks, two free slots."""
    generator = torch.Generator().manual_seed(3)
    layout = BlockLayout(40, 52, (8, 16), conv=conv)
    mask = torch.rand(layout.mask.shape, generator=generator) < 0.4
    layout = BlockLayout(40, 52, (8, 16), conv=conv, mask=mask, capacity=int(mask.sum()) + 2)
    suspended = torch.zeros_like(mask)
    suspended.view(-1)[mask.flatten().nonzero().flatten()[:3]] = True
    layout.suspend_(suspended)
    return layout


def update(layout: BlockLayout, release: bool = False) -> None:
    torch.ops.dynaprune.layout_update(
        layout.mask, layout.slot_of_block, layout.index, layout.capacity, layout.conv, release
    )


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv2d"])
@pytest.mark.parametrize("name", ["mask", "slot_of_block", "index"])
@pytest.mark.parametrize("left", [0, 1, -1], ids=["nothing", "one", "all but one"])
def test_layout_update_refuses_a_shrunken_storage(
    backend: str, name: str, conv: ConvGeometry | None, left: int
) -> None:
    layout = layout_of(conv)
    tensor = getattr(layout, name).clone()
    setattr(layout, name, tensor)
    elements = left if left >= 0 else tensor.numel() - 1
    size = elements * tensor.element_size()
    tensor.untyped_storage().resize_(size)
    arguments = (layout.mask, layout.slot_of_block, layout.index)
    with pytest.raises(ValueError, match=rf"layout_update: expected {name} .* got a storage of {size} bytes"):
        torch.ops.dynaprune.layout_update(*arguments, 40, conv, False)


def other_strides(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


MALFORMED: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "mask of bytes": lambda t: [t[0].to(torch.uint8), *t[1:]],
    "slots in int64": lambda t: [t[0], t[1].long(), t[2]],
    "index in int64": lambda t: [*t[:2], t[2].long()],
    "flat mask": lambda t: [t[0].flatten(), *t[1:]],
    "slots of another grid": lambda t: [t[0], t[1][:-1].contiguous(), t[2]],
    "no blocks": lambda t: [t[0][:0], t[1][:0], t[2]],
    "short index": lambda t: [*t[:2], t[2][:-2].clone()],
    "index of two dimensions": lambda t: [*t[:2], t[2][None]],
    "apart mask": lambda t: [other_strides(t[0]), *t[1:]],
    "apart slots": lambda t: [t[0], other_strides(t[1]), t[2]],
    "apart index": lambda t: [*t[:2], other_strides(t[2])],
    "one slot for all": lambda t: [t[0], t[1][:1, :1].expand(t[1].shape), t[2]],
}


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv2d"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_layout_update_refuses_other_tensors(backend: str, kind: str, conv: ConvGeometry | None) -> None:
    layout = layout_of(conv)
    tensors = MALFORMED[kind]([layout.mask, layout.slot_of_block, layout.index])
    with pytest.raises((ValueError, TypeError), match="layout_update"):
        torch.ops.dynaprune.layout_update(*tensors, layout.capacity, conv, True)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("slot", ["capacity", "far", "below", "lowest", "twice"])
def test_layout_update_refuses_slots_that_are_none(backend: str, slot: str, release: bool) -> None:
    layout = layout_of(None)
    live = layout.mask.flatten().nonzero().flatten()
    bad = {"capacity": layout.capacity, "far": 2**31 - 1, "below": -2, "lowest": -(2**31)}
    bad["twice"] = int(layout.slot_of_block.view(-1)[live[1]])
    layout.slot_of_block.view(-1)[live[0]] = bad[slot]
    with pytest.raises((ValueError, RuntimeError), match="expected slots of slot_of_block from -1 on"):
        update(layout, release)


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv2d"])
@pytest.mark.parametrize("release", [False, True])
def test_any_byte_but_zero_is_a_live_block(backend: str, release: bool, conv: ConvGeometry | None) -> None:
    layout = layout_of(conv)
    generator = torch.Generator().manual_seed(5)
    written = torch.randint(0, 256, layout.mask.shape, generator=generator, dtype=torch.uint8)
    written[torch.rand(layout.mask.shape, generator=generator) < 0.2] = 0
    layout.mask.view(torch.uint8).copy_(written)
    slots = layout.slot_of_block.numpy().copy()
    mask, slots, dropped = updated_slots(written.numpy() != 0, slots, layout.capacity, release)
    geometry = {"kernel": CONV[0:2], "stride": CONV[2:4], "dilation": CONV[6:8]} if conv else {}
    expected = packed_index(mask, slots, layout.capacity, overflow=dropped, **geometry)
    update(layout, release)
    assert dropped > 0
    assert layout.mask.view(torch.uint8).tolist() == mask.astype("uint8").tolist()
    assert layout.slot_of_block.tolist() == slots.tolist()
    assert layout.index.tolist() == expected.tolist()


WRONG: list[tuple[str, int, int]] = [
    ("header", 0, -1),
    ("header", 0, 10_000),
    ("row_ptr", 0, 1),
    ("row_ptr", 2, 10_000),
    ("row_ptr", -1, 2),
    ("col_ptr", 0, 1),
    ("col_ptr", 3, -1),
    ("col_ptr", -1, 10_000),
    ("row_cols", 0, -(2**31)),
    ("row_cols", 2, 2**31 - 1),
    ("row_slots", 0, -1),
    ("row_slots", 3, 10_000),
    ("block_of_slot", 4, 0),
    ("block_of_slot", 2, 2**31 - 1),
    ("row_order", 0, -1),
    ("row_order", 4, 5),
]


@pytest.fixture(params=["compiled", "torch"])
def checked_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DYNAPRUNE_BACKEND", "reference")
    if request.param == "torch":
        monkeypatch.setattr(index_check, "check_index", index_check.check_with_torch)
    elif not _extension.load().loaded:
        pytest.skip(str(_extension.load().reason))
    return request.param


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv2d"])
@pytest.mark.parametrize(("section", "at", "number"), WRONG)
def test_the_reference_names_what_is_wrong_in_an_index(
    checked_by: str, section: str, at: int, number: int, conv: ConvGeometry | None
) -> None:
    layout = layout_of(conv)
    s = sections(layout.index, layout.rows, layout.capacity)
    if section == "block_of_slot":
        at = int(s.row_slots[at])
    getattr(s, section)[at] = number
    at %= getattr(s, section).numel()
    if section.endswith("_ptr") and number == 10_000 and at < getattr(s, section).numel() - 1:
        at, number = at + 1, int(getattr(s, section)[at + 1])
    values = torch.zeros(layout.capacity, 16, 8)
    with pytest.raises(ValueError, match=rf"^index is corrupted: {section}\[{at}\] is {number}, expected"):
        reference.dense_weight(values, layout.index, 40, 52, conv)
    calls = [
        lambda: torch.ops.dynaprune.block_saliency(values, values, layout.index, layout.rows, layout.columns)
    ]
    if conv is None:
        x, dy = torch.zeros(3, 52), torch.zeros(3, 40)
        calls += [
            lambda: torch.ops.dynaprune.block_sparse_linear(x, values, None, layout.index, 40),
            lambda: torch.ops.dynaprune.block_sparse_linear_dgrad(dy, values, layout.index, 52),
            lambda: torch.ops.dynaprune.block_sparse_linear_wgrad(dy, x, layout.index, len(values), [8, 16]),
        ]
    for call in calls:
        with pytest.raises(ValueError, match="index is corrupted"):
            call()


def answer(check: Callable[..., None], *arguments: object) -> str:
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return "right"


@pytest.mark.skipif(not _extension.load().loaded, reason="the compiled kernels are not loaded")
@pytest.mark.parametrize("seed", range(8))
def test_both_checks_of_an_index_say_the_same(seed: int) -> None:
    """One number, or two, of any section become others."""
    pick = random.Random(seed)
    layout = layout_of(CONV if seed % 2 else None)
    right = layout.index.clone()
    said = set()
    for _ in range(300):
        layout.index.copy_(right)
        s = sections(layout.index, layout.rows, layout.capacity)
        for section in pick.sample(s._fields, pick.choice([1, 1, 2])):
            part = getattr(s, section)
            part[pick.randrange(part.numel())] = pick.choice([-1, 0, 1, 2, layout.capacity, 2**31 - 1])
        given = (layout.index, layout.rows, layout.columns, layout.capacity)
        compiled = answer(index_check.check_index, *given)
        assert compiled == answer(index_check.check_with_torch, *given)
        said.add(compiled.partition("[")[0])
    assert {
        "right",
        *(f"index is corrupted: {part}" for part in ("row_ptr", "row_cols", "row_order")),
    } <= said


def test_the_reference_takes_no_notice_of_what_stands_behind_the_live_blocks(checked_by: str) -> None:
    layout = layout_of(None)
    values = torch.randn(layout.capacity, 16, 8)
    before = reference.dense_weight(values, layout.index, 40, 52)
    s = sections(layout.index, layout.rows, layout.capacity)
    for part in (s.row_cols, s.row_slots, s.col_rows, s.col_cols, s.col_slots):
        part[int(s.header[0]) :] = 0
    assert torch.equal(reference.dense_weight(values, layout.index, 40, 52), before)


@pytest.mark.parametrize("name", ["x", "values", "bias", "index"])
def test_the_reference_refuses_a_shrunken_storage(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DYNAPRUNE_BACKEND", "reference")
    layout = layout_of(None)
    given = {
        "x": torch.zeros(3, 52),
        "values": torch.zeros(layout.capacity, 16, 8),
        "bias": torch.zeros(40),
        "index": layout.index,
    }
    given[name].untyped_storage().resize_(4)
    with pytest.raises(ValueError, match=rf"linear_forward: expected {name} .* got a storage of 4 bytes"):
        torch.ops.dynaprune.block_sparse_linear(*given.values(), 40)


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv2d"])
@pytest.mark.parametrize("more", [-2, 2, 12])
def test_the_reference_refuses_an_index_of_another_grid(more: int, conv: ConvGeometry | None) -> None:
    layout = layout_of(conv)
    index = torch.cat([layout.index, layout.index])[: layout.index.numel() + more]
    values = torch.zeros(layout.capacity, 16, 8)
    with pytest.raises(ValueError, match=r"expected an index with \d+ column lists, got \d+ by its length"):
        reference.dense_weight(values, index, 40, 52, conv)
