"""``pruner.removals``: the same counts as in the report, as a value that does not change afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dynaprune


def _trained(trial: bool, **settings: object) -> dynaprune.Pruner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.randn(256, 32), torch.randint(0, 10, (256,))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    config = dynaprune.PruningConfig(target_sparsity=0.7, block_size=8, total_steps=60, **settings)
    each = dynaprune.CalibrationTrial(
        model, TensorDataset(x, y), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")
    )
    pruner = dynaprune.attach(model, optimizer, config, trial=each if trial else None)
    before = pruner.removals
    assert (before.passed, before.forced, before.untested, before.neurons, before.events) == (0, 0, 0, 0, [])
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert before.passed == 0 and before.events == []
    return pruner


@pytest.mark.parametrize("trial", [True, False])
def test_they_are_the_report_s(trial: bool) -> None:
    settings = {"trial_budget": None} if trial else {"regrow": 0.3}
    pruner = _trained(trial, **settings)
    removals, report = pruner.removals, pruner.report()
    assert removals.passed == report["removed_passed"] and removals.forced == report["removed_forced"]
    assert removals.untested == report["removed_untested"] and removals.grown == report["blocks_regrown"]
    assert removals.neurons == report["neurons_removed"]
    assert removals.with_neurons == report["blocks_removed_with_neurons"]
    assert removals.neurons_refused == report["neurons_refused"]
    assert removals.events == report["trials"]["events"]
    assert (removals.passed > 0) == bool(removals.events) == trial
    assert (removals.untested > 0) == (removals.grown > 0) == (not trial)
    with pytest.raises(dataclasses.FrozenInstanceError):
        removals.passed = 1  # type: ignore[misc]
