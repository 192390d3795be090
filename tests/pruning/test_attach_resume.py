"""A pruner's state: training resumed from it goes on bit for bit, and that of something else is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dynaprune
from tests.pruning.attached import STEPS, adam, assert_equal, batch, mlp, settings, train


@pytest.mark.parametrize("order", ["model, optimizer, pruner", "pruner, optimizer, model"])
@pytest.mark.parametrize("stop", [5, 6, 11])
@pytest.mark.parametrize("neurons", [False, True])
def test_a_resumed_training_goes_on_bit_for_bit(order: str, stop: int, neurons: bool, tmp_path: Any) -> None:
    def made() -> dict[str, Any]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)
        data = torch.utils.data.TensorDataset(*batch(7, rows=300))
        losses: Any = lambda net, b: nn.functional.cross_entropy(net(b[0]), b[1], reduction="none")  # noqa: E731
        trial = dynaprune.CalibrationTrial(model, data, losses, samples=200, seed=4)
        schedule = {"interval": 2, "target_sparsity": 0.9 if neurons else 0.75}
        config = settings(regrow=0.5, observe_every=None, neurons=neurons, **schedule)
        pruner = dynaprune.attach(model, optimizer, config, trial=trial)
        return {"model": model, "optimizer": optimizer, "pruner": pruner}

    whole = made()
    train(whole["model"], whole["optimizer"], stop)
    saved = tmp_path / "checkpoint.pt"
    torch.save({name: part.state_dict() for name, part in whole.items()}, saved)
    train(whole["model"], whole["optimizer"], STEPS - stop, stop)

    resumed = made()
    loaded = torch.load(saved, weights_only=True)
    for name in order.split(", "):
        resumed[name].load_state_dict(loaded[name])
    train(resumed["model"], resumed["optimizer"], STEPS - stop, stop)
    assert_equal(list(resumed["model"].state_dict().values()), list(whole["model"].state_dict().values()))
    assert str(resumed["pruner"].score.state_dict()) == str(whole["pruner"].score.state_dict())
    drop = ("trials", "observing")
    assert (whole["pruner"].report()["neurons_removed"] > 0) == neurons
    reports = [
        {k: v for k, v in each["pruner"].report().items() if k not in drop} for each in (resumed, whole)
    ]
    assert reports[0] == reports[1]
    p_values = [
        [e["p_values"] for e in each["pruner"].report()["trials"]["events"]] for each in (resumed, whole)
    ]
    assert p_values[0] == p_values[1] != []


def test_a_pruner_without_its_models_state_is_found_out() -> None:
    model, other = mlp(), mlp()
    optimizer, other_optimizer = adam(model), adam(other)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer, 8)
    resumed = dynaprune.attach(other, other_optimizer, settings())
    resumed.load_state_dict(pruner.state_dict())
    with pytest.raises(RuntimeError, match="saved with another structure of 0 than the model has now"):
        train(other, other_optimizer, 1, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 99}, "expected a pruner's state of version 1, got 99"),
        (
            {"slots": {"nowhere": torch.zeros(1)}},
            r"expected the state of layers \['0', '2'\], got \['nowhere'\]",
        ),
        ({"trial": {"seed": 1, "draws": 2}}, "expected a trial that can continue the saved one"),
    ],
)
def test_the_state_of_something_else_is_refused(change: dict[str, Any], said: str) -> None:
    model = mlp()
    pruner = dynaprune.attach(model, adam(model), settings())
    with pytest.raises(ValueError, match=said):
        pruner.load_state_dict({**pruner.state_dict(), **change})
