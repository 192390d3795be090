"""Swaps whose drops are tested as they go: training is the same, and the report says what failed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from tests.pruning.attached import adam, assert_equal, batch, dense_weights, mlp, sparse_layers, train
from tests.pruning.attached import settings as attached_settings

TOTAL, INTERVAL = 48, 3
EVENTS = 11  # before 75% of it; the last one has nothing to swap


def settings(**changes: Any) -> dynaprune.PruningConfig:
    given = {"initial_sparsity": 0.5, "target_sparsity": 0.5, "rewire": 0.6, "total_steps": TOTAL}
    return attached_settings(**{**given, "interval": INTERVAL, **changes})


def start(*, harm: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A model, its optimizer and its pruner, and the steps after which the trial was called.

    Every suspended block adds ``harm`` to the losses of the trial.
    """
    model, calls = mlp(), list[int]()
    optimizer = adam(model)
    x, y = batch(99, rows=256)

    def trial() -> Tensor:
        calls.append(pruner.steps)
        layouts = [layer.layout for layer in sparse_layers(model)]
        suspended = sum(int((each.slot_of_block >= 0).sum()) - int(each.mask.sum()) for each in layouts)
        return nn.functional.cross_entropy(model(x), y, reduction="none") + harm * suspended

    pruner = dynaprune.attach(model, optimizer, settings(**changes), trial=trial)
    return {"model": model, "optimizer": optimizer, "pruner": pruner, "calls": calls}


def trained(**changes: Any) -> dict[str, Any]:
    begun = start(**changes)
    train(begun["model"], begun["optimizer"], TOTAL)
    return begun


@pytest.mark.parametrize("target", [0.5, 0.75])
def test_drops_go_whatever_comes_of_it_and_training_is_the_same(target: float) -> None:
    """Everything that is tested fails, and goes."""
    unaudited = trained(harm=1.0, target_sparsity=target)
    audited = trained(harm=1.0, target_sparsity=target, rewire_audit=4)
    assert_equal(dense_weights(audited["model"]), dense_weights(unaudited["model"]))
    one, other = (each["pruner"].report() for each in (unaudited, audited))
    assert one["blocks_swapped"] == other["blocks_swapped"] > 40
    assert one["rewire_audit"]["count"] == 0 and one["rewire_audit"]["events"] == []
    told = other["rewire_audit"]
    assert told["count"] == told["failed"] == 4
    assert 0 < told["blocks_failed"] == told["blocks_tested"] < other["blocks_swapped"]
    assert [event["step"] for event in told["events"]] == [6, 15, 21, 30]
    assert all(event["dropped"] == event["tested"] == event["failed"] for event in told["events"])
    names = ("events", "seconds", "share")
    trials = [{k: v for k, v in each["trials"].items() if k not in names} for each in (one, other)]
    assert trials[0] == trials[1], "removals have trials and an allowance of their own"
    steps = {event["step"] for event in other["trials"]["events"]}
    assert sorted(set(audited["calls"])) == sorted({6, 15, 21, 30} | steps)
    assert bool(steps) == (target > 0.5)


def test_what_does_no_harm_passes() -> None:
    """A tolerance of the whole loss, and samples enough to show it."""
    told = trained(tolerance=9.0, allowance=9.0, rewire_audit=EVENTS)["pruner"].report()
    audit = told["rewire_audit"]
    assert audit["count"] == EVENTS - 1 and audit["failed"] == audit["blocks_failed"] == 0
    assert audit["blocks_tested"] == told["blocks_swapped"] and audit["seconds"] > 0
    assert told["removed_passed"] == told["blocks_removed"] == 0


@pytest.mark.parametrize("target", [0.5, 0.75])
@pytest.mark.parametrize("stop", [7, 20])
def test_a_resumed_training_goes_on_with_its_audit(stop: int, target: float) -> None:
    names = ("model", "optimizer", "pruner")
    whole, resumed = (start(target_sparsity=target, rewire_audit=4) for _ in range(2))
    train(whole["model"], whole["optimizer"], stop)
    saved = copy.deepcopy({name: whole[name].state_dict() for name in names})
    train(whole["model"], whole["optimizer"], TOTAL - stop, stop)
    for name, state in saved.items():
        resumed[name].load_state_dict(state)
    train(resumed["model"], resumed["optimizer"], TOTAL - stop, stop)
    assert_equal(dense_weights(resumed["model"]), dense_weights(whole["model"]))
    one, other = (
        [
            {k: v for k, v in event.items() if k != "seconds"}
            for event in each["pruner"].report()["rewire_audit"]["events"]
        ]
        for each in (whole, resumed)
    )
    assert one == other and len(one) == 4


def test_a_state_from_before_there_were_audits_loads() -> None:
    begun = start(target_sparsity=0.75)
    train(begun["model"], begun["optimizer"], 20)
    state = begun["pruner"].state_dict()
    assert "audit" not in state["policy"], "the state of a training without one is as it was"
    for target in (0.5, 0.75):
        begun, later = start(target_sparsity=target), start(target_sparsity=target, rewire_audit=4)
        train(begun["model"], begun["optimizer"], 20)
        for name in ("model", "optimizer", "pruner"):
            later[name].load_state_dict(begun[name].state_dict())
        train(later["model"], later["optimizer"], TOTAL - 20, 20)
        told = later["pruner"].report()["rewire_audit"]
        assert [event["step"] for event in told["events"]] == [21, 30]


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"expected rewire beside rewire_audit, got 0\.0 and 2"):
        attached_settings(rewire_audit=2)
    with pytest.raises(ValueError, match="rewire_audit of at least 0, got -1"):
        settings(rewire_audit=-1)
    with pytest.raises(TypeError, match=r"rewire_audit to be a whole number, got 0\.1"):
        settings(rewire_audit=0.1)
    model = mlp()
    with pytest.raises(ValueError, match="expected a trial beside rewire_audit=2"):
        dynaprune.attach(model, torch.optim.SGD(model.parameters(), 0.1), settings(rewire_audit=2))
    assert [type(each) for each in model] == [type(each) for each in mlp()], "the model is as it was"
