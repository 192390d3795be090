"""Trials of a training: in parts, within their budget, resumed, and those of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.experiment.counted_trial import CountedTrial
from dynaprune.experiment.metrics import flops_of
from tests.pruning.attached import (
    STEPS,
    adam,
    assert_equal,
    batch,
    loss_of,
    mlp,
    settings,
    sparse_layers,
    train,
)

Losses = Callable[[nn.Module, Any], Tensor]


def losses_plus(harm: float) -> Losses:
    """Per-sample losses that rise by ``harm`` for every block that is suspended or gone."""

    def losses(model: nn.Module, part: Any) -> Tensor:
        gone = 96 - sum(layer.layout.live_count() for layer in sparse_layers(model))
        return nn.functional.cross_entropy(model(part[0]), part[1], reduction="none") + harm * gone

    return losses


def calibration(model: nn.Module, losses: Losses, samples: int = 1024) -> CountedTrial:
    data = torch.utils.data.TensorDataset(*batch(7, rows=samples + 100))
    return CountedTrial(
        dynaprune.CalibrationTrial(model, data, losses, samples, batch_size=samples // 4, seed=4)
    )


def test_parts_are_slices_of_the_whole() -> None:
    model = mlp()
    trial = calibration(model, losses_plus(0), 400)
    whole = trial()[0]
    assert trial.parts() == (100,) * 4
    assert torch.equal(torch.cat([trial.part(0, 1)[0], trial.part(1, 2)[0], trial.part(2, 4)[0]]), whole)
    trial.redraw()
    assert not torch.equal(trial()[0], whole)
    assert trial.calls == 5
    for first, last in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="expected batches among 4"):
            trial.part(first, last)


def test_harmful_sets_end_at_a_quarter_of_the_samples() -> None:
    model = mlp()
    optimizer, trial = adam(model), calibration(model, losses_plus(1.0))
    config = settings(target_sparsity=None, classes=4)
    pruner = dynaprune.attach(model, optimizer, config, trial=trial)
    train(model, optimizer, 6)
    events = pruner.report()["trials"]["events"]
    assert events and all(event["samples"] == 1024 and not event["passed"] for event in events)
    assert [event["evaluated"] for event in events] == [256 * (1 + len(e["p_values"])) for e in events]


@pytest.mark.parametrize("budget", [0.1, 0.05])
def test_trials_cost_no_more_than_their_share_and_the_schedule_goes_on(budget: float) -> None:
    """The FLOPs of all forward passes of trials against those of dense steps, by torch's own counter."""
    model, dense = mlp(), mlp()
    _, step_flops = flops_of(lambda: loss_of(dense, 0).backward())
    optimizer, trial = adam(model), calibration(model, losses_plus(1.0), samples=64)
    config = settings(total_steps=120, interval=3, trial_budget=budget, batch_size=16)
    pruner = dynaprune.attach(model, optimizer, config, trial=trial)
    with pytest.warns(RuntimeWarning, match="units go untested, since the schedule cannot wait"):
        train(model, optimizer, 120)
    report = pruner.report()
    assert report["target_reached"] and report["removed_passed"] == 0
    assert report["removed_untested"] == report["trials"]["budget"]["untested"] > 0
    assert report["removed_forced"] + report["removed_untested"] == report["blocks_removed"]
    assert report["trials"]["count"] > 0 and report["trials"]["budget"]["waited"] > 0
    assert 0 < trial.flops <= budget * 120 * step_flops
    # Counted by layers, without the input gradient that the first one needs not.
    assert report["trials"]["budget"]["spent"] <= budget


def test_without_a_target_events_wait_and_nothing_goes_untested() -> None:
    model = mlp()
    optimizer, trial = adam(model), calibration(model, losses_plus(0.0), samples=64)
    config = settings(target_sparsity=None, trial_budget=0.2, batch_size=16, end=0.6)
    pruner = dynaprune.attach(model, optimizer, config, trial=trial)
    train(model, optimizer)
    report = pruner.report()
    assert report["trials"]["budget"]["waited"] > 0 and report["removed_untested"] == 0


def test_a_trial_of_ones_own_is_asked_for_all_samples_at_once() -> None:
    model = mlp()
    x, y = batch(3, rows=1024)
    calls = []

    def trial() -> Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(trial_budget=None), trial=trial)
    train(model, optimizer, 12)
    events = pruner.report()["trials"]["events"]
    assert len(calls) == sum(1 + len(event["p_values"]) for event in events) > 0
    assert all(event["evaluated"] == 1024 * (1 + len(event["p_values"])) for event in events)


@pytest.mark.parametrize("stop", [8, 13])
def test_a_resumed_training_waits_and_tests_as_it_would_have(stop: int, tmp_path: Any) -> None:
    def made() -> dict[str, Any]:
        model = mlp()
        optimizer = adam(model)
        config = settings(interval=2, trial_budget=0.3, batch_size=16)
        pruner = dynaprune.attach(model, optimizer, config, trial=calibration(model, losses_plus(0.02), 64))
        return {"model": model, "optimizer": optimizer, "pruner": pruner}

    whole = made()
    train(whole["model"], whole["optimizer"], stop)
    torch.save({name: part.state_dict() for name, part in whole.items()}, tmp_path / "saved.pt")
    train(whole["model"], whole["optimizer"], STEPS - stop, stop)
    resumed = made()
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    for name, part in resumed.items():
        part.load_state_dict(loaded[name])
    train(resumed["model"], resumed["optimizer"], STEPS - stop, stop)
    assert_equal(list(resumed["model"].state_dict().values()), list(whole["model"].state_dict().values()))
    one, other = (each["pruner"].report()["trials"] for each in (whole, resumed))
    assert one["budget"] == other["budget"] and one["budget"]["waited"] > 0 and one["count"] > 1
    assert [e["p_values"] for e in one["events"]] == [e["p_values"] for e in other["events"]]
    assert whole["pruner"].policy.state_dict()["ladder"] == resumed["pruner"].policy.state_dict()["ladder"]


def test_a_state_without_ladder_and_budget_goes_on() -> None:
    model = mlp()
    optimizer = adam(model)
    trial = calibration(model, losses_plus(0.02), 64)
    pruner = dynaprune.attach(model, optimizer, settings(), trial=trial)
    train(model, optimizer, 8)
    state = pruner.state_dict()
    state["policy"] = {}
    del state["step_flops"], state["trial_state"]["early"]
    pruner.load_state_dict(state)
    assert pruner.policy.trials is not None and pruner.policy.trials.budget.spent == 0
    train(model, optimizer, STEPS - 8, 8)
    assert pruner.target_reached
