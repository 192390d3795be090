"""The layout of a layer goes wherever its model goes; nothing that averages or casts reaches it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dynaprune.nn import BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear
from dynaprune_kernels import BlockLayout
from tests.rounding import agree

STRUCTURE = ("mask", "slot_of_block", "index")


def network() -> nn.Sequential:
    """A convolution and a linear layer with dead blocks, free slots and a batch norm between them."""
    torch.manual_seed(0)
    conv = BlockSparseConv2d.from_dense(nn.Conv2d(8, 16, 3, padding=1), 8)
    linear = BlockSparseLinear.from_dense(nn.Linear(16, 24), 8)
    for layer in (conv, linear):
        layer.layout.update_(torch.rand(layer.layout.rows, layer.layout.columns) < 0.6)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(conv, nn.BatchNorm2d(16), pool, linear).eval()


def layers(model: nn.Module) -> list[BlockSparseLayer]:
    return [module for module in model.modules() if isinstance(module, BlockSparseLayer)]


def image() -> Tensor:
    return torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(1))


def assert_same_structure(found: nn.Module, expected: nn.Module) -> None:
    for mine, theirs in zip(layers(found), layers(expected), strict=True):
        for name in STRUCTURE:
            one, other = getattr(mine.layout, name), getattr(theirs.layout, name)
            assert one.dtype == other.dtype and torch.equal(one, other), name
        assert mine.probe.dtype == torch.bool


def test_nothing_of_the_structure_is_a_buffer_or_a_parameter() -> None:
    model = network()
    held = [*model.buffers(), *model.parameters()]
    for layer in layers(model):
        for tensor in (*(getattr(layer.layout, name) for name in STRUCTURE), layer.probe):
            assert all(tensor is not each for each in held)
    assert {name.rsplit(".", 1)[1] for name, _ in model.named_buffers()} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_state_dict_has_a_copy_of_the_slots_of_its_own(keep_vars: bool) -> None:
    model = network()
    before = copy.deepcopy(model)
    states = [model.state_dict(keep_vars=keep_vars) for _ in range(2)]
    slots = [key for key in states[0] if "layout" in key]
    assert slots == ["0.layout.slot_of_block", "3.layout.slot_of_block"]
    for key in slots:
        assert states[0][key].dtype == torch.int32
        assert torch.equal(states[0][key], states[1][key])
        states[0][key].fill_(7)
        assert not torch.equal(states[0][key], states[1][key])
    assert_same_structure(model, before)


def test_a_layer_that_stands_in_two_places_has_one_copy_per_state_dict() -> None:
    layer = network()[3]
    model = nn.ModuleDict({"a": layer, "b": layer})
    first, second = model.state_dict(), model.state_dict()
    assert first["a.layout.slot_of_block"] is first["b.layout.slot_of_block"]
    assert first["a.layout.slot_of_block"] is not second["a.layout.slot_of_block"]


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "float, then back": lambda model: model.double().float(),
    "to a dtype": lambda model: model.to(torch.float64),
    "to a device and a dtype": lambda model: model.to("cpu", torch.float64),
    "to another tensor": lambda model: model.to(torch.zeros((), dtype=torch.float64)),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "type, integers too": lambda model: model.type(torch.float64),
    "a function of one's own": lambda model: model._apply(lambda tensor: tensor * 2),
    "a function of one's own, in place": lambda model: model._apply(lambda tensor: tensor.zero_()),
    "share_memory": lambda model: model.share_memory(),
    "requires_grad_": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_leave_the_structure_alone(name: str) -> None:
    model, before = network(), network()
    cast = CASTS[name](model)
    assert cast is model
    assert_same_structure(model, before)


def test_a_cast_model_computes_what_it_did() -> None:
    model, x = network(), image()
    expected = model(x)
    torch.testing.assert_close(model.double()(x.double()).float(), expected)


def test_the_tensors_stay_the_same_objects_where_nothing_moves() -> None:
    layout = network()[0].layout
    before = [getattr(layout, name) for name in STRUCTURE]
    layout.to("cpu").float()
    assert all(getattr(layout, name) is tensor for name, tensor in zip(STRUCTURE, before, strict=True))


def test_shared_memory_holds_the_structure_too() -> None:
    model = network().share_memory()
    assert all(getattr(layer.layout, name).is_shared() for layer in layers(model) for name in STRUCTURE)


@pytest.mark.parametrize("way", ["to_empty", "to_empty from meta", "to_empty of a deep copy"])
def test_the_structure_survives_the_meta_device_and_to_empty(way: str) -> None:
    model, x = network(), image()
    expected, state = model(x), model.state_dict()
    moved: nn.Module = copy.deepcopy(model)
    if way != "to_empty":
        moved = moved.to("meta")
        assert all(t.is_meta for layer in layers(moved) for t in (layer.layout.index, layer.probe))
        assert moved(x.to("meta")).shape == expected.shape
        assert torch.equal(moved.state_dict()["3.layout.slot_of_block"], state["3.layout.slot_of_block"])
    if way == "to_empty of a deep copy":
        moved = copy.deepcopy(moved)
    moved.to_empty(device="cpu")
    assert_same_structure(moved, model)
    moved.load_state_dict(state)
    assert agree(moved(x), expected)


def test_a_layout_that_was_made_on_meta_is_all_dead_when_it_leaves() -> None:
    mask = torch.zeros(3, 2, dtype=torch.bool, device="meta")
    layout = BlockLayout(24, 16, 8, mask=mask, capacity=4, device="meta").to_empty(device="cpu")
    assert layout.live_count() == 0 and layout.capacity == 4 and not layout.mask.any()
    assert layout.slot_of_block.tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_of_another_structure_loads(assign: bool, device: str) -> None:
    model, x = network(), image()
    expected, state = model(x), model.state_dict()
    other = network()
    for layer in layers(other):
        layer.layout.update_(torch.ones_like(layer.layout.mask))
    other.to(device)
    if device == "meta" and not assign:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: a copy to meta parameters does nothing
            other.load_state_dict(state)
        other.to_empty(device="cpu").load_state_dict(state)
    else:
        other.load_state_dict(state, assign=assign)
    assert_same_structure(other, model)
    assert agree(other(x), expected)


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved_whole(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, _pickled, _saved_whole])
def test_copies_and_pickles_hold_the_structure(again: Callable[[nn.Module], Any]) -> None:
    model, x = network(), image()
    twin = again(model)
    assert_same_structure(twin, model)
    assert agree(twin(x), model(x))
    if again is not copy.copy:
        twin[0].layout.release_(twin[0].layout.mask.clone())
        assert twin[0].density() == 0 < model[0].density()


def test_a_pickle_of_the_time_when_they_were_buffers() -> None:
    model, x = network(), image()
    old = copy.deepcopy(model)
    for layer in layers(old):
        for module, names in ((layer.layout, STRUCTURE), (layer, ("probe",))):
            for name in names:
                module.register_buffer(name, module.__dict__.pop(name), persistent=name == "slot_of_block")
    new = _pickled(old)
    assert_same_structure(new, model)
    assert {name for name, _ in new.named_buffers()} == {name for name, _ in model.named_buffers()}
    assert agree(new(x), model(x))


@pytest.mark.parametrize("given", ["parameters", "parameters and buffers", "state dict"])
def test_functional_call(given: str) -> None:
    model, x = network(), image()
    expected = model(x)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    if given == "parameters and buffers":
        tensors.update(model.named_buffers())
    elif given == "state dict":
        tensors = model.state_dict()
    assert agree(functional_call(model, tensors, (x,)), expected)
    doubled = {name: tensor * 2 if name == "3.bias" else tensor for name, tensor in tensors.items()}
    torch.testing.assert_close(functional_call(model, doubled, (x,)), expected + model[3].bias)
    assert_same_structure(model, network())


def test_compiled_after_a_change_of_structure() -> None:
    model, x = network(), image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    for layer in layers(model):
        gone = layer.layout.mask.clone()
        gone[1:] = False
        layer.layout.release_(gone)
    torch.testing.assert_close(compiled(x), model(x))
    moved = model.double()
    torch.testing.assert_close(compiled(x.double()), moved(x.double()))


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool) -> None:
    model, x = network(), image()
    program = torch.export.export(model, (x,), strict=strict)
    assert agree(program.module()(x), model(x))
    assert not any("layout" in name for name in program.state_dict)


def test_the_tap_moves_along() -> None:
    layer = network()[3]
    layer.enable_tap_()
    layer.double()
    layer(torch.randn(2, 16, dtype=torch.float64)).sum().backward()
    assert layer.tap.dtype == torch.float64 and layer.tap.grad is not None


def test_loading_says_what_is_missing_or_wrong() -> None:
    model = network()
    state = model.state_dict()
    lacking = {key: value for key, value in state.items() if key != "3.layout.slot_of_block"}
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.layout\.slot_of_block"):
        model.load_state_dict(lacking)
    assert model.load_state_dict(lacking, strict=False).missing_keys == ["3.layout.slot_of_block"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*3\.layout\.mask"):
        model.load_state_dict({**state, "3.layout.mask": torch.zeros(3, 2)})
    short = {**lacking, "3.values": state["3.values"][:1]}
    with pytest.raises(ValueError, match=r"no 3\.layout\.slot_of_block.*pruner\.follow"):
        model.load_state_dict(short, strict=False)
    with pytest.raises(TypeError, match="int32"):
        model.load_state_dict({**state, "3.layout.slot_of_block": state["3.layout.slot_of_block"].long()})
    assert_same_structure(model, network())


def test_a_layout_loads_by_itself() -> None:
    layout, state = network()[3].layout, network()[3].layout.state_dict()
    layout.update_(torch.ones_like(layout.mask))
    layout.load_state_dict(state)
    assert torch.equal(layout.mask, state["slot_of_block"] >= 0)
    assert layout.live_count() == int(layout.mask.sum())


def test_averages_of_equal_slots_load_and_of_different_ones_are_refused() -> None:
    model, other = network(), network()
    slots = model.state_dict()["3.layout.slot_of_block"]
    average = slots * (1 + 6e-4)
    other.load_state_dict({**model.state_dict(), "3.layout.slot_of_block": average})
    assert_same_structure(other, model)
    changed = slots.flip(0)
    with pytest.raises(ValueError, match="averages of different"):
        other.load_state_dict({**model.state_dict(), "3.layout.slot_of_block": 0.9 * slots + 0.1 * changed})
    whole = {**model.state_dict(), "3.layout.slot_of_block": changed.float()}
    other.load_state_dict(whole)
    assert torch.equal(other[3].layout.slot_of_block, changed)
    assert_same_structure(network(), model)


def test_averages_of_equal_slots_that_were_cut_to_integers_load() -> None:
    torch.manual_seed(0)
    layer = BlockSparseLinear.from_dense(nn.Linear(128, 128), 8)
    layer.layout.release_(torch.rand(16, 16) < 0.4)
    with torch.no_grad():
        layer.values.masked_fill_((layer.layout.block_of_slot < 0).view(-1, 1, 1), 0)
    state = layer.state_dict()
    slots = state["layout.slot_of_block"]
    average = slots.clone()
    for _ in range(9):
        average.copy_(0.9 * average + (1 - 0.9) * slots)
    assert not torch.equal(average, slots)
    other = copy.deepcopy(layer)
    other.load_state_dict({**state, "layout.slot_of_block": average})
    assert_same_structure(other, layer)
    shifted = torch.where(slots > 0, slots - 1, slots)
    values = state["values"].roll(-1, 0)
    shifted[slots == 0] = -1
    values[-1] = 0
    other.load_state_dict({**state, "values": values, "layout.slot_of_block": shifted})
    assert torch.equal(other.layout.slot_of_block, shifted)
    for wrong in (layer.layout.capacity, 2**31 - 1, -2):
        beyond = torch.where(shifted == shifted.max(), wrong, shifted)
        with pytest.raises(ValueError, match="below the capacity"):
            other.load_state_dict({**state, "values": values, "layout.slot_of_block": beyond.int()})
