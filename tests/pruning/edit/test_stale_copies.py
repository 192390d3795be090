"""Copies that do not follow: averages are found out; what is kept, evaluated or trained is left alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dynaprune
from tests.pruning.attached import STEPS, adam, batch, loss_of, mlp, settings, sparse_layers, train
from tests.pruning.edit.averaging_recipes import RECIPES, LoadedStateDict, OverData, _Module

MODULES = [
    name
    for name, recipe in RECIPES.items()
    if not name.startswith("ema-pytorch") and issubclass(recipe, _Module)  # type: ignore[arg-type]
]
TENSORS = [name for name in RECIPES if name not in MODULES and not name.startswith("ema-pytorch")]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "loaded state dict"])
def test_an_average_is_found_out_at_the_event_after_its_update(name: str) -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    recipe = RECIPES[name](model)
    with pytest.raises(RuntimeError, match=r"pruner\.follow\(copy\)"):
        train(model, optimizer, after=lambda: recipe.update(model) and None)
    assert pruner.structure_version == 0 and pruner.sparsity == 0


@pytest.mark.parametrize("name", [*TENSORS, "loaded state dict"])
def test_an_average_of_tensors_of_another_shape_raises(name: str) -> None:
    model = mlp()
    optimizer = adam(model)
    dynaprune.attach(model, optimizer, settings())
    recipe = RECIPES[name](model)
    with pytest.raises(RuntimeError, match="size"):
        train(model, optimizer, after=lambda: recipe.update(model) and None)


def test_a_state_that_was_averaged_over_two_structures_does_not_load() -> None:
    model = mlp()
    optimizer = adam(model)
    dynaprune.attach(model, optimizer, settings(compact=False))
    recipe = LoadedStateDict(model)
    with pytest.raises(ValueError, match="averages of different ones"):
        train(model, optimizer, after=lambda: recipe.update(model) and None)


@pytest.mark.parametrize("late", [False, True])
def test_an_average_is_found_out_at_its_first_forward(late: bool) -> None:
    """One that begins after the last event, as stochastic weight averaging does, and through ``.data``."""
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(compact=False))
    recipe = OverData(model)
    steps = STEPS if late else 3
    train(model, optimizer, steps)
    assert pruner.target_reached == late
    recipe.copy(batch(0)[0])
    train(model, optimizer, 1, steps)
    recipe.update(model)
    with pytest.raises(RuntimeError, match=r"pruner\.follow\(copy\)"):
        recipe.copy(batch(0)[0])
    if late:
        pruner.detach()
        with pytest.raises(RuntimeError, match=r"pruner\.follow\(copy\)"):
            recipe.copy(batch(0)[0])


def test_an_average_that_begins_when_the_structure_is_final_needs_nothing() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer, STEPS // 2)
    assert pruner.target_reached
    recipe = OverData(model)
    expected = [layer.weight.clone() for layer in sparse_layers(model)]
    train(model, optimizer, STEPS // 2, STEPS // 2, after=lambda: recipe.update(model) and None)
    assert recipe.copy(batch(0)[0]).shape == (16, 4)
    for layer, before in zip(sparse_layers(recipe.copy), expected, strict=True):
        assert not torch.equal(layer.weight, before)


def _torch_saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


KEPT: dict[str, Callable[[nn.Module], Any]] = {
    "deep copy": copy.deepcopy,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "in half precision": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "in double, and back": lambda model: copy.deepcopy(model).double().float(),
    "frozen": lambda model: copy.deepcopy(model).eval().requires_grad_(False),
    "saved whole": _torch_saved,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "cast by hand": lambda model: _cast_by_hand(copy.deepcopy(model)),
}


def _cast_by_hand(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("name", KEPT)
def test_a_copy_that_is_only_kept_and_evaluated_never_raises(name: str) -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    kept = KEPT[name](model)
    x = batch(0)[0].to(next(kept.parameters()).dtype)
    expected = kept(x).detach()
    train(model, optimizer, after=lambda: torch.testing.assert_close(kept(x).detach(), expected))
    assert pruner.target_reached


def test_the_best_model_is_kept_by_loading() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    best = copy.deepcopy(model)
    x = batch(0)[0]

    def keep() -> None:
        best.load_state_dict(model.state_dict())
        torch.testing.assert_close(best(x), model(x))

    train(model, optimizer, after=keep)
    assert pruner.target_reached


def test_a_copy_that_trains_by_itself_is_a_network_of_its_own() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    other = copy.deepcopy(model)
    own = adam(other)

    def tune() -> None:
        loss_of(other, 5).backward()
        own.step()
        own.zero_grad(set_to_none=True)

    train(model, optimizer, after=tune)
    assert pruner.target_reached


def test_a_copy_with_a_pruner_of_its_own() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    other = copy.deepcopy(model)
    own = adam(other)
    second = dynaprune.attach(other, own, settings())
    train(other, own, STEPS // 2)
    train(model, optimizer)
    assert pruner.target_reached and second.target_reached


def test_a_copy_forgets_what_it_watched_when_the_model_is_gone() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(compact=False))
    average = OverData(model)
    train(model, optimizer, 4)
    average.update(model)
    pruner.detach()
    del model, optimizer, pruner
    average.copy(batch(0)[0])


def test_compiled_and_exported_copies_run() -> None:
    model = mlp()
    optimizer = adam(model)
    dynaprune.attach(model, optimizer, settings())
    kept = copy.deepcopy(model).eval()
    x = batch(0)[0]
    expected = kept(x)
    train(model, optimizer, 6)
    compiled = torch.compile(kept, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(kept, (x,)).module()(x), expected)
