"""The tasks that ``dynaprune compare`` knows: data, model, loss, metric and the experiment's defaults.

A task is one `Task` object in its own module; the modules are imported only when asked for, so that the
command line starts quickly and a task's libraries are needed only by those who run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaprune.experiment.tasks.metric import ACCURACY, F1, Metric

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset

__all__ = ["Split", "Task", "TaskData", "accuracy_and_f1", "get_task", "task_names"]

_MODULES = {
    "digits": "dynaprune.experiment.tasks.digits",
    "titanic": "dynaprune.experiment.tasks.titanic",
    "cifar10": "dynaprune.experiment.tasks.cifar10",
    "imdb": "dynaprune.experiment.tasks.imdb",
    "lm": "dynaprune.experiment.tasks.lm",
    "common_voice": "dynaprune.experiment.tasks.common_voice",
    "spoken_digits": "dynaprune.experiment.tasks.spoken_digits",
}


@dataclass(frozen=True)
class Split:
    """Which part of the data is the test part, and where the data come from.

    ``fold`` of ``folds`` is the test part (stratified k-fold, shuffled by ``seed``); without folds one fifth
    is, drawn by ``seed``. One eighth of the rest is the validation part in both cases. Tasks with an official
    test set keep it. ``source`` is ``None`` (the environment's DYNAPRUNE_DATA, else the hub), ``"hub"``, or a
    folder. In the folder ``kept`` a task may keep what it has worked out of the data, for the other arm."""

    seed: int
    fold: int | None = None
    folds: int | None = None
    source: str | None = None
    kept: Path | None = None


@dataclass(frozen=True)
class TaskData:
    """Prepared data: three datasets of ``(inputs, target)``, ready for the model, and what was done to get
    them.

    ``classes`` is None where a sample has more than one label. ``collate`` makes a batch of a list of samples
    (None: torch's default); ``augment(inputs, generator)`` changes a training batch, never one of the
    calibration, validation or test samples. ``options`` are the task's own settings that the data were loaded
    with, for `Task.build_model`."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: int | None
    description: dict[str, Any] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] | None = None
    augment: Callable[[Any, torch.Generator], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _call_model(model: nn.Module, inputs: Any) -> torch.Tensor:
    return model(inputs)


def _cross_entropy_per_sample(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from torch import nn

    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def _likeliest_class(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.argmax(dim=-1)


def accuracy_and_f1(average: str) -> Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]:
    """A `Task.score` of true and predicted classes: accuracy and F1 (scikit-learn, ``average`` "macro" or
    "binary"), both 0..1."""

    def score(truth: Sequence[Any], guess: Sequence[Any]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        f1 = f1_score(truth, guess, average=average, zero_division=0.0)
        return {"accuracy": float(accuracy_score(truth, guess)), "f1": float(f1)}

    return score


@dataclass(frozen=True)
class Task:
    """Everything an arm needs to know about a task.

    ``load(split, options)`` gives the data; ``build_model(data, dropout)`` a fresh model whose initial
    weights depend on torch's global seed only (not on ``dropout``); ``forward(model, inputs)`` its outputs,
    one row per sample; ``losses(outputs, targets)`` one loss per sample ``[n]``.

    ``metrics`` are those that every evaluation has, the one that decides first. ``predict(outputs)`` turns
    outputs into one prediction per sample (a tensor ``[n]`` or a list); ``score(truth, predictions)`` turns
    those of an evaluation, as lists, into the metrics by name, and whatever else the task reports.
    ``score_of_loss(loss)`` takes the place of both where the metrics follow from the mean loss.

    ``defaults`` are the settings of `RunConfig` in which the task differs from the experiment, ``presets``
    named settings that take their place. ``self_paced`` takes the place of ``defaults["pruning"]`` where
    there is no target. ``options`` are those of `TaskOptions` that the task has, with their defaults.
    ``pretrain(model, data, config, device, states)`` trains the fresh model before both arms and returns what
    the report says of it; it runs once for both, where the option "pretrain_epochs" is above 0. In ``states``
    (`StateFiles`) it keeps what it goes on from where it is cut short.

    ``fixed_test``: every seed has the same test part, as long as there are no folds.

    ``width_option`` is the option that makes the network narrower, by hand.
    ``narrower`` has, by the name of a control, the networks that it may take: given the options, those of
    ever wider networks up to the whole one, for each width the usual one first, then others near it.

    ``evaluation_batch`` is the number of samples per forward pass in evaluations and trials, where the usual
    128 and 256 would take too much memory."""

    name: str
    title: str
    load: Callable[[Split, Mapping[str, Any]], TaskData]
    build_model: Callable[[TaskData, float], nn.Module]
    score: Callable[[Sequence[Any], Sequence[Any]], dict[str, float]] = field(
        default_factory=lambda: accuracy_and_f1("macro")
    )
    metrics: tuple[Metric, ...] = (ACCURACY, F1)
    defaults: dict[str, Any] = field(default_factory=dict)
    self_paced: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    uses_data_folder: bool = True
    fixed_test: bool = True
    evaluation_batch: int | None = None
    forward: Callable[[nn.Module, Any], Any] = _call_model
    losses: Callable[[Any, torch.Tensor], torch.Tensor] = _cross_entropy_per_sample
    predict: Callable[[Any], Any] = _likeliest_class
    score_of_loss: Callable[[float], dict[str, float]] | None = None
    pretrain: Callable[[nn.Module, TaskData, Any, torch.device, Any], dict[str, Any]] | None = None
    width_option: str | None = None
    narrower: Mapping[str, Callable[[Mapping[str, Any]], Sequence[Sequence[dict[str, Any]]]]] = field(
        default_factory=dict
    )


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
