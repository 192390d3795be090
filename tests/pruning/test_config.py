"""Settings come one by one or by component, and are one and the same configuration."""

from __future__ import annotations

import copy
import inspect
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from dynaprune import PruningConfig, Ranking, Regrowth, Schedule, Scope, TrialRules
from dynaprune.pruning.config import GROUPS


def test_both_forms_are_equal() -> None:
    flat = PruningConfig(
        target_sparsity=0.9, total_steps=10, threshold=0.05, regrow=0.2, block_size=8, seed=3
    )
    grouped = PruningConfig(
        schedule=Schedule(target_sparsity=0.9, total_steps=10),
        trial_rules=TrialRules(threshold=0.05),
        regrowth=Regrowth(0.2),
        scope=Scope(block_size=8),
        ranking=Ranking(seed=3),
    )
    assert flat == grouped and flat.to_json() == grouped.to_json()
    assert grouped.total_steps == grouped.schedule.total_steps == 10
    assert flat.trial_rules == TrialRules(threshold=0.05)


def test_every_setting_of_a_component_is_a_setting_by_itself() -> None:
    own = {"observe_every", "policy"}
    parts = [f.name for kind in GROUPS.values() for f in fields(kind)]
    assert len(parts) == len(set(parts)) and {*parts, *own} == {f.name for f in fields(PruningConfig)}
    config = PruningConfig()
    for name, kind in GROUPS.items():
        assert getattr(config, name) == kind()
        for f in fields(kind):
            assert getattr(config, f.name) == getattr(kind(), f.name)


def test_a_setting_comes_once() -> None:
    with pytest.raises(TypeError, match="expected total_steps in schedule or by itself, got both"):
        PruningConfig(schedule=Schedule(), total_steps=3)
    with pytest.raises(TypeError, match="expected schedule as a Schedule, got dict"):
        PruningConfig(schedule={})
    with pytest.raises(TypeError, match=r"expected settings among target_sparsity.*got 'sparsity'"):
        PruningConfig(sparsity=0.5)
    with pytest.raises(TypeError, match="expected target_sparsity once, got it twice"):
        PruningConfig(0.5, target_sparsity=0.5)


def test_replace_copies_and_refuses_to_change() -> None:
    config = PruningConfig(0.9, total_steps=10)
    assert replace(config, total_steps=20).total_steps == 20 and replace(config) == config
    assert copy.deepcopy(config) == config
    with pytest.raises(FrozenInstanceError):
        config.total_steps = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="0 <= start < end"):
        replace(config, start=0.6)


def test_settings_are_listed_with_their_defaults() -> None:
    parameters = inspect.signature(PruningConfig).parameters
    assert list(parameters)[:3] == ["target_sparsity", "block_size", "total_steps"]
    assert parameters["threshold"].default == 0.01


def test_the_keys_of_the_json_stay() -> None:
    assert list(PruningConfig().to_json()) == [
        "target_sparsity", "block_size", "total_steps", "start", "end", "interval", "score", "score_decay",
        "allocation", "cost", "floor", "floors", "threshold", "tolerance", "absolute_tolerance", "allowance",
        "classes", "rungs", "self_paced_share", "regrow", "neurons", "types", "include", "exclude",
        "observe_every", "batch_size", "compact", "seed", "units", "initial_sparsity", "initial_allocation",
        "mask_pretrained", "sparse_learning_rate", "rewire", "rewire_growth", "rewire_score", "rewire_until",
        "rewire_audit",
        "trial_budget",
        "target_of",
    ]  # fmt: skip


def test_what_is_handed_in_is_checked() -> None:
    with pytest.raises(TypeError, match=r"policy as an object with due.step. and decide.view., got int"):
        PruningConfig(policy=3)
    with pytest.raises(TypeError, match=r"a score by name or a dynaprune.Score, got object without name"):
        PruningConfig(score=object())
