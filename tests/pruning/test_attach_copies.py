"""Copies and averages of the model beside ``attach``: those that follow, and those that fell behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import dynaprune
from tests.pruning.attached import (
    adam,
    assert_equal,
    batch,
    dense_weights,
    mlp,
    settings,
    sparse_layers,
    train,
)


@pytest.mark.parametrize("made", ["before attach", "after attach"])
@pytest.mark.parametrize("neurons", [False, True])
def test_a_weight_average_that_follows(made: str, neurons: bool) -> None:
    model = mlp()
    optimizer = adam(model)
    average_of = swa_utils.get_ema_multi_avg_fn(0.5)
    if made == "before attach":
        average = swa_utils.AveragedModel(model, multi_avg_fn=average_of)
    pruner = dynaprune.attach(model, optimizer, settings(neurons=neurons), example_inputs=batch(0)[0])
    if made == "after attach":
        average = swa_utils.AveragedModel(model, multi_avg_fn=average_of)
    pruner.follow(average)
    by_hand: list[Tensor] = []

    def after() -> None:
        average.update_parameters(model)
        for number, weight in enumerate(dense_weights(model)):
            if len(by_hand) <= number:
                by_hand.append(weight)
            elif not neurons:
                by_hand[number] = torch.lerp(by_hand[number], weight, 0.5)

    train(model, optimizer, after=after)
    assert pruner.target_reached
    assert (pruner.report()["neurons_removed"] > 0) == neurons
    for mine, other in zip(sparse_layers(model), sparse_layers(average), strict=True):
        assert torch.equal(mine.layout.slot_of_block, other.layout.slot_of_block)
        assert mine.values.shape == other.values.shape
    assert average(batch(0)[0]).shape == (16, 4)
    if not neurons:
        weights = zip(dense_weights(average), by_hand, dense_weights(model), strict=True)
        for found, expected, live in weights:
            torch.testing.assert_close(found, torch.where(live != 0, expected, 0))


def test_a_weight_average_that_does_not_follow_is_found_out() -> None:
    model = mlp()
    optimizer = adam(model)
    dynaprune.attach(model, optimizer, settings())
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    with pytest.raises(RuntimeError, match=r"pruner\.follow\(copy\)"):
        train(model, optimizer, after=lambda: average.update_parameters(model))


def test_a_copy_that_is_only_kept_or_loaded_is_no_error() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    kept = copy.deepcopy(model)
    best = copy.deepcopy(model)
    train(model, optimizer, after=lambda: best.load_state_dict(model.state_dict()) and None)
    assert pruner.target_reached
    assert_equal(dense_weights(best), dense_weights(model))
    assert sparse_layers(kept)[0].density() == 1.0


def test_a_copy_that_fell_behind_cannot_follow() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    late = copy.deepcopy(model)
    train(model, optimizer)
    with pytest.raises(ValueError, match="structure that the model has now"):
        pruner.follow(late)
    with pytest.raises(ValueError, match="without it"):
        pruner.follow(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="expected the copy as an"):
        pruner.follow([model])  # type: ignore[arg-type]
