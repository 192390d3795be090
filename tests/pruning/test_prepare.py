"""``prepare`` and then ``attach`` is ``attach``, with whatever a loop does between the two."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dynaprune
from dynaprune.nn import BlockSparseLayer
from tests.pruning.attached import STEPS, adam, assert_equal, batch, dense_weights, mlp, settings, train


@pytest.mark.parametrize("example", [None, batch(0)[0]])
@pytest.mark.parametrize("neurons", [False, True])
def test_two_phases_are_one_bit_for_bit(neurons: bool, example: torch.Tensor | None) -> None:
    config = settings(neurons=neurons, regrow=0.2)
    whole = mlp()
    optimizer = adam(whole)
    pruner = dynaprune.attach(whole, optimizer, config, example_inputs=example)
    train(whole, optimizer)
    parts = mlp()
    prepared = dynaprune.prepare(parts, config, example_inputs=example)
    later = adam(parts)
    second = dynaprune.attach(prepared, later)
    train(parts, later)
    assert_equal(dense_weights(parts), dense_weights(whole))
    assert pruner.report()["history"] == second.report()["history"]
    assert pruner.exempt == second.exempt


def test_parameters_stay_the_same_objects_and_a_state_loads_in_between() -> None:
    trained = mlp()
    dynaprune.prepare(trained, settings())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    model = mlp()
    before = list(model.parameters())
    prepared = dynaprune.prepare(model, settings())
    model.load_state_dict(trained.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    pruner = dynaprune.attach(prepared, adam(model))
    assert_equal(dense_weights(model), dense_weights(trained))
    assert list(pruner.layers) == ["0", "2"]


def test_a_prepared_layer_that_no_optimizer_holds_becomes_dense_again() -> None:
    model = mlp()
    weight = model[2].weight.detach().clone()
    prepared = dynaprune.prepare(model, settings())
    with pytest.warns(RuntimeWarning, match=r"1 layers with 4,096 weights are not trained.*\(2\)"):
        pruner = dynaprune.attach(prepared, torch.optim.SGD(model[0].parameters(), 0.1))
    assert list(pruner.layers) == ["0"]
    assert pruner.exempt["2"] == "no optimizer given holds its weight"
    assert type(model[2]) is nn.Linear and torch.equal(model[2].weight, weight)


def test_a_layer_frozen_in_between_becomes_dense_again() -> None:
    model = mlp()
    prepared = dynaprune.prepare(model, settings())
    model[0].values.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="not trained"):
        pruner = dynaprune.attach(prepared, adam(model))
    assert list(pruner.layers) == ["2"] and pruner.exempt["0"] == "it is frozen"
    assert type(model[0]) is nn.Linear and not model[0].weight.requires_grad


def test_settings_may_stay_open_until_attach() -> None:
    model = mlp()
    prepared = dynaprune.prepare(model, settings(total_steps=None))
    with pytest.raises(ValueError, match="expected total_steps"):
        dynaprune.attach(prepared, adam(model))
    pruner = dynaprune.attach(prepared.for_training(STEPS, 16), adam(model))
    assert (pruner.config.total_steps, pruner.config.batch_size) == (STEPS, 16)


def test_settings_come_once() -> None:
    model = mlp()
    prepared = dynaprune.prepare(model, settings())
    for twice in ({"config": settings()}, {"example_inputs": batch(0)[0]}):
        with pytest.raises(ValueError, match="config and example_inputs in prepare, got them in attach"):
            dynaprune.attach(prepared, adam(model), **twice)


def test_an_optimizer_that_has_stepped_on_dense_weights_is_refused() -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, 1)
    prepared = dynaprune.prepare(model, settings())
    with pytest.raises(ValueError, match=r"state of 0.*of before prepare.*build the optimizer after prepare"):
        dynaprune.attach(prepared, optimizer)


def test_what_cannot_be_prepared_is_as_it_was() -> None:
    class Reshapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = 1.0 if type(self.fc) is nn.Linear else 2.0
            return self.out(self.fc(x)) * scale

    model = Reshapes()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="its outputs move"):
        dynaprune.prepare(model, settings(), example_inputs=torch.randn(3, 32))
    assert not any(isinstance(m, BlockSparseLayer) for m in model.modules())
    assert_equal(dense_weights(model), dense_weights(before))
    with pytest.raises(TypeError, match="expected a PruningConfig, got dict"):
        dynaprune.prepare(model, {})  # type: ignore[arg-type]
