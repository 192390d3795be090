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
from tests.pruning.averaging_recipes import RECIPES, Recipe


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
    assert (pruner.removals.grown > 0) == (regrow > 0)
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
