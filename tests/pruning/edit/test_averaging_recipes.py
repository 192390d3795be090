"""Every usual way to average weights beside a pruned training: right if it follows, found out if not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.nn import BlockSparseLayer
from tests.pruning.attached import STEPS, adam, batch, loss_of, settings
from tests.pruning.edit.averaging_recipes import RECIPES, Recipe


def network() -> nn.Sequential:
    """32-64-64-4 with a batch norm."""
    torch.manual_seed(1)
    layers = [nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 4))


def dense(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Parameters in float64; values of blocks cut out and put in place one by one, as ``model`` has them."""
    found = {}
    for name, tensor in tensors.items():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, BlockSparseLayer) and name.endswith(".values"):
            bo, bi = module.layout.block
            weight = torch.zeros(module.layout.rows * bo, module.layout.columns * bi, dtype=torch.float64)
            for row, slots in enumerate(module.layout.slot_of_block.tolist()):
                for column, slot in enumerate(slots):
                    if slot >= 0:
                        block = tensor[slot].detach().double().t()
                        weight[row * bo : (row + 1) * bo, column * bi : (column + 1) * bi] = block
            found[name] = weight[: module.layout.out_features, : module.layout.in_features]
        else:
            found[name] = tensor.detach().double().clone()
    return found


def live(model: nn.Module) -> dict[str, Tensor]:
    """Where each parameter lives, in its dense shape: true outside of block-sparse layers."""
    ones = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    return {name: tensor > 0 for name, tensor in dense(ones, model).items()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.double().clone() for n, b in model.named_buffers() if b.is_floating_point()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        bound = 1e-6 * expected[name].abs().clamp(min=1)
        assert bool(((tensor - expected[name]).abs() <= bound).all()), name


def reference(before: dict[str, Tensor], now: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    return {name: keep * before[name] + (1 - keep) * now[name] for name in now}


@pytest.mark.parametrize("regrow", [0.0, 0.4])
@pytest.mark.parametrize("name", RECIPES)
def test_an_average_that_follows_is_the_dense_average(name: str, regrow: float) -> None:
    """Averaged densely beside it: what dies is zero from then on, and starts at zero when it returns."""
    if name.startswith("ema-pytorch"):
        pytest.importorskip("ema_pytorch")
    model = network()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(regrow=regrow))
    recipe = RECIPES[name](model)
    for followed in recipe.followed():
        pruner.follow(followed)
    expected = dense(dict(model.named_parameters()), model)
    statistics = buffers(model)
    was = live(model)
    capacities = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        stayed, was = was, live(model)
        expected = {n: tensor * (stayed[n] & was[n]) for n, tensor in expected.items()}
        keep = recipe.update(model)
        expected = reference(expected, dense(dict(model.named_parameters()), model), keep)
        statistics = reference(statistics, buffers(model), keep)
        assert_close(dense(recipe.tensors(model), model), expected)
        if recipe.averages_buffers and hasattr(recipe, "copy"):
            assert_close(buffers(recipe.copy), statistics)
        capacities.add(tuple(layer.layout.capacity for layer in pruner.layers.values()))
    assert pruner.target_reached and len(capacities) > 1
    assert (pruner.ledger.grown > 0) == (regrow > 0)
    assert_computes(recipe, model, expected)
    pruner.finalize()
    assert_plain(recipe, model, expected)


def assert_computes(recipe: Recipe, model: nn.Module, expected: dict[str, Tensor]) -> None:
    """The average, in a network, computes what the dense average computes."""
    twin = copy.deepcopy(model)
    values = recipe.tensors(model)
    if isinstance(getattr(recipe, "shadow", None), dict) and "0.layout.slot_of_block" in recipe.shadow:
        twin.load_state_dict(recipe.shadow)
    else:
        for name, parameter in twin.named_parameters():
            parameter.data.copy_(values[name])
    x = batch(99)[0]
    plain = network()
    names = {name.replace(".values", ".weight"): tensor for name, tensor in expected.items()}
    plain.load_state_dict({**plain.state_dict(), **{n: t.float() for n, t in names.items()}})
    plain[1].load_state_dict(twin[1].state_dict())
    torch.testing.assert_close(twin.eval()(x), plain.eval()(x))


def assert_plain(recipe: Recipe, model: nn.Module, expected: dict[str, Tensor]) -> None:
    """After ``finalize`` the average is dense too."""
    names = {name.replace(".values", ".weight"): tensor for name, tensor in expected.items()}
    if type(recipe).__name__ == "TupleOfState":
        held = [tensor for tensor in recipe.shadow if tensor.is_floating_point()]  # type: ignore[attr-defined]
        found = [t for t in held if any(t.shape == e.shape for e in names.values())]
        assert all(tensor.dim() < 3 for tensor in found)
        return
    if type(recipe).__name__ == "FlatBuffers":
        holder: Any = recipe.holder  # type: ignore[attr-defined]
        assert holder.get_buffer("0values").dim() == 2
        return
    assert_close(dense(recipe.tensors(model), model), names)


SAME_DECAY = ["dict", "dict in place", "dict in float64", "dict by Parameter", "dict of a state", "list"]


@pytest.mark.parametrize(
    "name", [*SAME_DECAY, "dict of a state's floats", "tuple of a state", "flat buffers"]
)
def test_tensors_that_follow_a_cut_of_neurons_are_those_of_a_module_that_follows(name: str) -> None:
    """Neurons leave and constants move into biases: the average's own constants, not the model's."""
    model = network()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(neurons=True), example_inputs=batch(0)[0])
    recipe, module = RECIPES[name](model), RECIPES["parameters"](model)
    for followed in (*recipe.followed(), *module.followed()):
        pruner.follow(followed)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        recipe.update(model)
        module.update(model)
        assert_close(dense(recipe.tensors(model), model), dense(module.tensors(model), model))
    assert pruner.report()["neurons_removed"] > 0
    pruner.finalize()
    assert_close(dense(module.tensors(model), model), dense(dict(module.copy.named_parameters()), model))


def test_an_average_in_another_dtype_follows_a_cut_of_neurons() -> None:
    model = network()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(neurons=True), example_inputs=batch(0)[0])
    wide, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    for each in (wide, plain):
        pruner.follow(each)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        with torch.no_grad():
            for average in (wide, plain):
                for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs.to(mine.dtype), 0.2)
    assert pruner.report()["neurons_removed"] > 0
    assert_close(dense(dict(wide.named_parameters()), model), dense(dict(plain.named_parameters()), model))
    assert wide(batch(0)[0].double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["dict", "dict by Parameter", "list", "tuple of a state", "parameters"])
def test_a_copy_from_before_attach_follows(name: str) -> None:
    model = network()
    optimizer = adam(model)
    recipe = RECIPES[name](model)
    pruner = dynaprune.attach(model, optimizer, settings())
    if name == "tuple of a state":
        with pytest.raises(ValueError, match="expected a list with a copy of each parameter"):
            pruner.follow(recipe.followed()[0])
        return
    expected = dense(dict(model.named_parameters()), model)
    for followed in recipe.followed():
        pruner.follow(followed)
    was = live(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        stayed, was = was, live(model)
        keep = recipe.update(model)
        expected = {n: tensor * (stayed[n] & was[n]) for n, tensor in expected.items()}
        expected = reference(expected, dense(dict(model.named_parameters()), model), keep)
        assert_close(dense(recipe.tensors(model), model), expected)
    assert pruner.target_reached


def test_what_cannot_follow_is_refused_with_what_was_expected() -> None:
    model = network()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    with pytest.raises(ValueError, match="the model itself"):
        pruner.follow(model)
    with pytest.raises(ValueError, match="the model itself"):
        pruner.follow(copy.copy(model))
    with pytest.raises(ValueError, match=r"got none for 0\.values"):
        pruner.follow({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"each parameter \(8\)"):
        pruner.follow([p.detach().clone() for p in model.parameters()][:-1])
    with pytest.raises(TypeError, match="got str"):
        pruner.follow({name: "x" for name, _ in model.named_parameters()})
    with pytest.raises(TypeError, match="a dict or a list of tensors, got generator"):
        pruner.follow(p for p in model.parameters())  # type: ignore[arg-type]
    late = {name: p.detach().clone() for name, p in model.named_parameters()}
    early = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner.follow(early)
    for step in range(6):
        loss_of(model, step).backward()
        optimizer.step()
    with pytest.raises(ValueError, match="right after making it"):
        pruner.follow(late)
    early["0.values"] = early["0.values"][:1]
    with pytest.raises(RuntimeError, match=r"stale.*'0\.values' of shape"):
        for step in range(6):
            loss_of(model, step).backward()
            optimizer.step()


def test_several_averages_in_one_module_all_follow() -> None:
    model = network()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    holder = nn.ModuleDict({"online": model, "slow": copy.deepcopy(model), "slower": copy.deepcopy(model)})
    pruner.follow(holder)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        for name, share in (("slow", 0.5), ("slower", 0.1)):
            with torch.no_grad():
                for mine, theirs in zip(holder[name].parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs, share)
    assert pruner.target_reached
    assert [a.shape for a in holder["slow"].parameters()] == [p.shape for p in model.parameters()]
    assert [a.shape for a in holder["slower"].parameters()] == [p.shape for p in model.parameters()]


def test_tied_weights_in_a_state_dict_stay_two_tensors() -> None:
    plain, norm = network(), nn.BatchNorm1d(64)
    model = nn.Sequential(plain[0], norm, nn.ReLU(), plain[3], norm, nn.ReLU(), plain[5])
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    shadow = {name: value.clone() for name, value in model.state_dict().items()}
    pruner.follow(shadow)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                shadow[name].mul_(0.5).add_(value, alpha=0.5)
    assert pruner.target_reached
    assert torch.equal(shadow["1.weight"], shadow["4.weight"])
    assert shadow["1.weight"].data_ptr() != shadow["4.weight"].data_ptr()
