"""Neural networks that get smaller and faster while they train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynaprune.families.family import Family
    from dynaprune.integrations.lightning import DynaPruneLightningCallback
    from dynaprune.integrations.transformers import DynaPruneCallback
    from dynaprune.nn import BlockSparseConv1d, BlockSparseConv2d, BlockSparseLinear, swap_back, swap_layers
    from dynaprune.pruning.attach import attach
    from dynaprune.pruning.budget import steps_for_budget
    from dynaprune.pruning.config import PruningConfig
    from dynaprune.pruning.decide.calibration import CalibrationTrial
    from dynaprune.pruning.decide.policy import Policy, View
    from dynaprune.pruning.decide.trial import Trial
    from dynaprune.pruning.decide.trial_rules import TrialRules
    from dynaprune.pruning.edit.edits import Grow, Release, Rewire
    from dynaprune.pruning.memory import MemoryByKind, StepMemory, memory_of_step
    from dynaprune.pruning.observe.score import MeanScore, Score
    from dynaprune.pruning.prepare import prepare
    from dynaprune.pruning.prepared import Prepared
    from dynaprune.pruning.pruner import Pruner
    from dynaprune.pruning.recalibration import recalibrate_batch_norm
    from dynaprune.pruning.settings import Ranking, Regrowth, Rewiring, Schedule, Scope, SparseStart
    from dynaprune.saving.checkpoint import load, save

_HOMES = {
    "BlockSparseConv1d": "dynaprune.nn",
    "BlockSparseConv2d": "dynaprune.nn",
    "BlockSparseLinear": "dynaprune.nn",
    "CalibrationTrial": "dynaprune.pruning.decide.calibration",
    "DynaPruneCallback": "dynaprune.integrations.transformers",
    "DynaPruneLightningCallback": "dynaprune.integrations.lightning",
    "Family": "dynaprune.families.family",
    "Grow": "dynaprune.pruning.edit.edits",
    "MeanScore": "dynaprune.pruning.observe.score",
    "MemoryByKind": "dynaprune.pruning.memory",
    "Policy": "dynaprune.pruning.decide.policy",
    "Prepared": "dynaprune.pruning.prepared",
    "Pruner": "dynaprune.pruning.pruner",
    "PruningConfig": "dynaprune.pruning.config",
    "Ranking": "dynaprune.pruning.settings",
    "Regrowth": "dynaprune.pruning.settings",
    "Release": "dynaprune.pruning.edit.edits",
    "Rewire": "dynaprune.pruning.edit.edits",
    "Rewiring": "dynaprune.pruning.settings",
    "Schedule": "dynaprune.pruning.settings",
    "Scope": "dynaprune.pruning.settings",
    "Score": "dynaprune.pruning.observe.score",
    "SparseStart": "dynaprune.pruning.settings",
    "StepMemory": "dynaprune.pruning.memory",
    "Trial": "dynaprune.pruning.decide.trial",
    "TrialRules": "dynaprune.pruning.decide.trial_rules",
    "View": "dynaprune.pruning.decide.policy",
    "attach": "dynaprune.pruning.attach",
    "load": "dynaprune.saving.checkpoint",
    "memory_of_step": "dynaprune.pruning.memory",
    "prepare": "dynaprune.pruning.prepare",
    "recalibrate_batch_norm": "dynaprune.pruning.recalibration",
    "save": "dynaprune.saving.checkpoint",
    "steps_for_budget": "dynaprune.pruning.budget",
    "swap_back": "dynaprune.nn",
    "swap_layers": "dynaprune.nn",
}

__all__ = [
    "BlockSparseConv1d",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "CalibrationTrial",
    "DynaPruneCallback",
    "DynaPruneLightningCallback",
    "Family",
    "Grow",
    "MeanScore",
    "MemoryByKind",
    "Policy",
    "Prepared",
    "Pruner",
    "PruningConfig",
    "Ranking",
    "Regrowth",
    "Release",
    "Rewire",
    "Rewiring",
    "Schedule",
    "Scope",
    "Score",
    "SparseStart",
    "StepMemory",
    "Trial",
    "TrialRules",
    "View",
    "attach",
    "load",
    "memory_of_step",
    "prepare",
    "recalibrate_batch_norm",
    "save",
    "steps_for_budget",
    "swap_back",
    "swap_layers",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import dynaprune`` itself stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dynaprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
