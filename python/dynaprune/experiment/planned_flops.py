"""The FLOPs of an arm's whole training before it has begun: counted on two samples, times its schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from dynaprune.experiment.length import samples_until, total_steps
from dynaprune.experiment.metrics import flops_of
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.tasks import Task, TaskData
from dynaprune.experiment.tasks.data import batches
from dynaprune.pruning.planned_flops import FlopsOfSample, planned_flops
from dynaprune.pruning.prepare import prepare

__all__ = [
    "flops_of_dense",
    "flops_of_pruned",
    "flops_of_pruned_by_steps",
    "flops_of_sample",
    "rows_of",
    "with_options",
]

_SAMPLES = 2


def with_options(data: TaskData, options: Mapping[str, Any]) -> TaskData:
    """The same samples for a network of other ``options``."""
    known = {name: value for name, value in options.items() if name in data.description}
    return replace(data, options=dict(options), description={**data.description, **known})


def rows_of(data: TaskData) -> int:
    """Training samples."""
    return len(data.train)  # type: ignore[arg-type]


def flops_of_sample(
    config: RunConfig, task: Task, data: TaskData, sparsity: float = 0.0
) -> tuple[float, float]:
    """FLOPs per sample of a step, forward and backward, and of its forward pass alone.

    Args:
        sparsity: of blocks that were left out uniformly.
    """
    with torch.random.fork_rng():
        model = task.build_model(with_options(data, config.options), 0.0).train()
        inputs, targets = next(batches(data.train, _SAMPLES, collate=data.collate))
        if sparsity:
            settings = replace(config, initial_sparsity=sparsity, target_sparsity=sparsity)
            pruning = settings.pruning_config(total_steps(config, rows_of(data)), data.classes)
            prepare(model, pruning, example_inputs=inputs)
        losses, forward = flops_of(lambda: task.losses(task.forward(model, inputs), targets).mean())
        _, backward = flops_of(losses.backward)
    return (forward + backward) / len(targets), forward / len(targets)


def flops_of_dense(config: RunConfig, task: Task, data: TaskData) -> float:
    """FLOPs of a whole training of the dense network."""
    rows = rows_of(data)
    step, _ = flops_of_sample(config, task, data)
    return step * samples_until(total_steps(config, rows), config, rows)


def flops_of_pruned(config: RunConfig, task: Task, data: TaskData) -> float:
    """FLOPs of a whole training of the pruned arm, as scheduled: see `dynaprune.pruning.planned_flops`.

    Raises:
        ValueError: settings whose FLOPs are known afterwards only.
    """
    return flops_of_pruned_by_steps(config, task, data)(total_steps(config, rows_of(data)))


def flops_of_pruned_by_steps(config: RunConfig, task: Task, data: TaskData) -> Callable[[int], float]:
    """FLOPs of a training of the pruned arm as a function of its steps.

    Raises:
        ValueError: settings whose FLOPs are known afterwards only.
    """
    rows = rows_of(data)
    seen = functools.partial(samples_until, config=config, rows=rows)
    pruning = config.pruning_config(total_steps(config, rows), data.classes)
    planned_flops(pruning, FlopsOfSample(0.0, 0.0), seen)  # whether it can be
    assert pruning.target_sparsity is not None
    dense, dense_forward = flops_of_sample(config, task, data)
    begins, forward = dense, dense_forward
    if pruning.initial_sparsity:
        begins, forward = flops_of_sample(config, task, data, pruning.initial_sparsity)
    ends = begins
    if not pruning.stands_still:
        ends, _ = flops_of_sample(config, task, data, pruning.target_sparsity)
    of_sample = FlopsOfSample(begins, ends, dense_forward - forward)
    return lambda steps: planned_flops(config.pruning_config(steps, data.classes), of_sample, seen)
