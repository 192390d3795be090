"""Neural networks that get smaller and faster while they train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynaprune.integrations.lightning import DynaPruneLightningCallback
    from dynaprune.integrations.transformers import DynaPruneCallback
    from dynaprune.nn import BlockSparseConv1d, BlockSparseConv2d, BlockSparseLinear, swap_back, swap_layers
    from dynaprune.pruning.attach import attach
    from dynaprune.pruning.config import PruningConfig
    from dynaprune.pruning.decide.calibration import CalibrationTrial
    from dynaprune.pruning.pruner import Pruner
    from dynaprune.pruning.recalibration import recalibrate_batch_norm
    from dynaprune.saving.checkpoint import load, save

_HOMES = {
    "BlockSparseConv1d": "dynaprune.nn",
    "BlockSparseConv2d": "dynaprune.nn",
    "BlockSparseLinear": "dynaprune.nn",
    "CalibrationTrial": "dynaprune.pruning.decide.calibration",
    "DynaPruneCallback": "dynaprune.integrations.transformers",
    "DynaPruneLightningCallback": "dynaprune.integrations.lightning",
    "Pruner": "dynaprune.pruning.pruner",
    "PruningConfig": "dynaprune.pruning.config",
    "attach": "dynaprune.pruning.attach",
    "load": "dynaprune.saving.checkpoint",
    "recalibrate_batch_norm": "dynaprune.pruning.recalibration",
    "save": "dynaprune.saving.checkpoint",
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
    "Pruner",
    "PruningConfig",
    "attach",
    "load",
    "recalibrate_batch_norm",
    "save",
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
