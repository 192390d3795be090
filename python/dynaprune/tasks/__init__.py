"""The tasks that ``dynaprune compare`` knows: data, model, loss, metric and the experiment's defaults.

A task is one `Task` object in its own module; the modules are imported only when asked for, so that the
command line starts quickly and a task's libraries are needed only by those who run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

__all__ = ["Defaults", "Split", "Task", "TaskData", "get_task", "task_names"]

_MODULES = {
    "digits": "dynaprune.tasks.digits",
    "titanic": "dynaprune.tasks.titanic",
}


@dataclass(frozen=True)
class Split:
    """Which part of the data is the test part, and where the data come from.

    ``fold`` of ``folds`` is the test part (stratified k-fold, shuffled by ``seed``); without folds one fifth
    is, drawn by ``seed``. One eighth of the rest is the validation part in both cases. Tasks with an official
    test set keep it. ``source`` is ``None`` (the environment's DYNAPRUNE_DATA, else the hub), ``"hub"``, or a
    folder."""

    seed: int
    fold: int | None = None
    folds: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class TaskData:
    """Prepared data: three datasets of ``(inputs, target)``, ready for the model, and what was done to get
    them."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: int
    description: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Defaults:
    """A task's settings. The values here are the experiment's; a task that needs others says so in its
    module.

    ``pruning`` holds further arguments of `dynaprune.PruningConfig`; ``self_paced`` those that take their
    place where there is no target."""

    epochs: int = 50
    lr: float = 1e-3
    batch_size: int = 32
    weight_decay: float = 1e-4
    patience: int = 5
    dropout: float = 0.5
    threshold: float = 0.01
    block_size: int = 32
    target_sparsity: float = 0.9
    calibration_samples: int = 1024
    pruning: dict[str, Any] = field(default_factory=dict)
    self_paced: dict[str, Any] = field(default_factory=dict)


def _call_model(model: nn.Module, inputs: Any) -> torch.Tensor:
    return model(inputs)


def _cross_entropy_per_sample(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True)
class Task:
    """Everything an arm needs to know about a task.

    ``load(split)`` gives the data; ``build_model(data, dropout)`` a fresh model whose initial weights depend
    on torch's global seed only (not on ``dropout``); ``forward(model, inputs)`` its class scores ``[n,
    classes]``; ``losses(outputs, targets)`` one loss per sample ``[n]``; ``f1_average`` is scikit-learn's
    ``average``."""

    name: str
    title: str
    load: Callable[[Split], TaskData]
    build_model: Callable[[TaskData, float], nn.Module]
    f1_average: str = "macro"
    defaults: Defaults = field(default_factory=Defaults)
    paper: dict[str, Any] = field(default_factory=dict)
    uses_data_folder: bool = True
    forward: Callable[[nn.Module, Any], torch.Tensor] = _call_model
    losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _cross_entropy_per_sample


def task_names() -> list[str]:
    """The names that `get_task` takes."""
    return list(_MODULES)


def get_task(name: str) -> Task:
    """The task called ``name``; ValueError naming the known ones otherwise."""
    if name not in _MODULES:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(task_names())}")
    task = import_module(_MODULES[name]).TASK
    assert isinstance(task, Task)
    return task
