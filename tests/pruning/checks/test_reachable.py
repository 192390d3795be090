"""What keeps a target out of reach is said with numbers: floors, frozen layers, layers without gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.nn import swap_layers
from dynaprune.pruning.checks.reachable import most_sparsity
from tests.pruning.attached import STEPS, adam, mlp, settings, train


def quietly(error: bool = True) -> Any:
    context = warnings.catch_warnings()
    context.__enter__()
    warnings.simplefilter("error", RuntimeWarning)
    warnings.filterwarnings("ignore", "block-sparse ops on cpu run on the dense backend")
    return context


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"floor": 0.5}, 0.5),
        ({"floors": {"0": 1.0}}, (64 - 2) / 96),  # the floor of 0.02 keeps 2 of 64 blocks
        ({"floors": {"2": 0.5}, "target_sparsity": 0.8}, (31 + 32) / 96),
        ({"block_size": 32, "target_sparsity": 0.9}, (1024 + 3072) / 6144),
    ],
)
def test_floors_and_large_blocks_are_said_at_attach(changes: dict[str, Any], most: float) -> None:
    model = mlp()
    config = settings(**changes)
    with pytest.warns(RuntimeWarning, match="out of reach: each layer keeps a block") as record:
        pruner = dynaprune.attach(model, adam(model), config)
    assert f"target of {config.target_sparsity:.1%}" in str(record[0].message)
    assert f"at most {most:.1%} of the prunable weights can go" in str(record[0].message)
    assert most_sparsity(pruner.structure, pruner.config) == pytest.approx(most)


@pytest.mark.parametrize("changes", [{"floor": 0.5}, {"block_size": 32, "target_sparsity": 0.9}])
def test_training_comes_as_far_as_was_said_and_no_further(changes: dict[str, Any]) -> None:
    model = mlp()
    optimizer = adam(model)
    with pytest.warns(RuntimeWarning, match="out of reach"):
        pruner = dynaprune.attach(model, optimizer, settings(**changes))
    train(model, optimizer, 2 * STEPS)
    assert (
        pruner.sparsity == pytest.approx(most_sparsity(pruner.structure, pruner.config))
        and not pruner.target_reached
    )


def test_a_target_just_within_reach_is_not_said() -> None:
    for changes in ({"floor": 0.25}, {"block_size": 32, "target_sparsity": 0.66}, {"floor": 0.0}):
        model = mlp()
        context = quietly()
        pruner = dynaprune.attach(model, adam(model), settings(**changes))
        context.__exit__(None, None, None)
        assert most_sparsity(pruner.structure, pruner.config) >= pruner.config.target_sparsity  # type: ignore[operator]


def freeze(model: nn.Sequential) -> torch.optim.Optimizer:
    model[0].requires_grad_(False)
    return adam(model)


def leave_out(model: nn.Sequential) -> torch.optim.Optimizer:
    return adam(model[1:])


def freeze_after_the_swap(model: nn.Sequential) -> torch.optim.Optimizer:
    """As a Trainer does, whose callback swaps the layers first."""
    swap_layers(model, 8)
    model[0].requires_grad_(False)
    return adam(model[1:])


def freeze_what_came_dense(model: nn.Sequential) -> torch.optim.Optimizer:
    swap_layers(model, 8, exclude=["0"])
    return freeze(model)


@pytest.mark.parametrize("how", [freeze, leave_out, freeze_after_the_swap, freeze_what_came_dense])
def test_layers_that_are_not_trained_are_said_at_attach(how: Any) -> None:
    model = mlp()
    optimizer = how(model)
    with pytest.warns(RuntimeWarning, match="1 layers with 2,048 weights are not trained") as record:
        pruner = dynaprune.attach(model, optimizer, settings())
    said = str(record[0].message)
    assert "the target of 75.0% counts the 4,096 weights of the other 1 layers, and is 50.0% of both" in said
    context = quietly()
    train(model, optimizer)
    pruner.detach()
    context.__exit__(None, None, None)
    assert pruner.target_reached


class Branches(nn.Module):
    """``used`` trains; ``other`` does not take part, or is cut off from the loss."""

    def __init__(self, cut_off: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.used, self.other = nn.Linear(32, 64), nn.Linear(32, 64)
        self.head = nn.Linear(64, 4)
        self.cut_off = cut_off

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.used(x)
        if self.cut_off:
            hidden = hidden + self.other(x).detach()
        return self.head(torch.relu(hidden))


@pytest.mark.parametrize("cut_off", [False, True])
def test_layers_that_get_no_gradient_are_said_once(cut_off: bool) -> None:
    model = Branches(cut_off)
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    with pytest.warns(RuntimeWarning, match="no gradient has reached 1 of 2 pruned layers") as record:
        train(model, optimizer)
    found = [str(each.message) for each in record if "no gradient has reached" in str(each.message)]
    (said,) = found
    assert "up to step 10, 50.0% of the prunable weights (other)" in said
    assert "at most 48.4% can go, short of the target's 75.0%" in said
    assert model.other.density() == 1  # type: ignore[operator]
    assert pruner.sparsity <= most_sparsity(pruner.structure, pruner.config, ["other"]) + 1e-9


def test_a_target_that_the_other_layers_reach_is_not_said() -> None:
    model = Branches(cut_off=False)
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(target_sparsity=0.4))
    context = quietly()
    train(model, optimizer)
    context.__exit__(None, None, None)
    assert pruner.target_reached


def test_layers_that_are_frozen_after_attach() -> None:
    model = mlp()
    optimizer = adam(model)
    dynaprune.attach(model, optimizer, settings())
    model[2].requires_grad_(False)
    with pytest.warns(RuntimeWarning, match=r"no gradient has reached 1 of 2 .*66.7% of the .* \(2\)"):
        train(model, optimizer)
