"""The epochs of an arm's training: all of them, or until early stopping or an interrupt."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynaprune.experiment import metrics
from dynaprune.experiment.interrupts import StopRequest
from dynaprune.experiment.network import DenseNetwork
from dynaprune.experiment.progress import EpochProgress
from dynaprune.experiment.steps import TrainState, evaluate, now
from dynaprune.experiment.tasks import TaskData
from dynaprune.experiment.tasks.data import batches_per_epoch, training_batches
from dynaprune.experiment.tasks.metric import beside_the_loss
from dynaprune.experiment.write import write_csv
from dynaprune.nn.to_device import to_device
from dynaprune.pruning.early_stopping import EarlyStopping

__all__ = ["Outcome", "train_epochs"]


@dataclass
class Outcome:
    """What an arm's training left behind. ``kept`` is the best model with its structure, and what was said of
    it."""

    history: list[dict[str, Any]] = field(default_factory=list)
    kept: tuple[nn.Module, dict[str, Any]] | None = None
    best_epoch: int | None = None
    first_steps: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    ended: str = "ran all epochs"


def train_epochs(
    state: TrainState,
    arm: str,
    data: TaskData,
    network: DenseNetwork,
    order: torch.Generator,
    stop: StopRequest,
    out: Path,
    quiet: bool,
) -> Outcome:
    """All epochs, or until early stopping or an interrupt; ``history.csv`` is written after every epoch."""
    config, device = state.config, state.device
    done = Outcome()
    stopping = EarlyStopping(config.patience)
    total_steps = config.epochs * batches_per_epoch(data.train, config.batch_size)
    measured_version: int | None = None
    begun = now(device)
    metric = beside_the_loss(state.task.metrics)
    with EpochProgress(arm, config.epochs, total_steps, metric, quiet=quiet) as progress:
        for epoch in range(1, config.epochs + 1):
            version_before, loss_sum, seen = network.version(), torch.zeros((), device=device), 0
            for inputs, targets in training_batches(data, config.batch_size, order):
                inputs, targets = to_device(inputs, device), targets.to(device)
                changed = network.version() != measured_version
                measured_version = network.version()
                loss_sum += state.step(inputs, targets, count_flops=changed) * len(targets)
                seen += len(targets)
                done.steps += 1
                network.after_step(done.steps)
                progress.advance()
                if stop.requested:
                    break
            if len(done.first_steps) < metrics.STEPS_TIMED:
                done.first_steps = state.step_seconds[: metrics.STEPS_TIMED]
            network.before_evaluation()
            validation_loss, scores = evaluate(state.task, state.model, data.validation, device, data.collate)
            best = stopping.update(
                epoch,
                validation_loss,
                standing=network.final_standing(),
                structure_changed=network.version() != version_before,
            )
            if best:
                done.kept = (copy.deepcopy(state.model), network.facts())
            done.history.append(
                {
                    "arm": arm,
                    "epoch": epoch,
                    "step": done.steps,
                    "seconds": now(device) - begun,
                    "train_loss": float(loss_sum) / seen,
                    "validation_loss": validation_loss,
                    **{f"validation_{name}": value for name, value in scores.items()},
                    "sparsity": network.sparsity(),
                    "parameters_active": network.parameters_active(),
                    "flops_per_step": state.flops_per_step(-1),
                    "step_seconds": metrics.median_seconds(state.step_seconds[-metrics.STEPS_TIMED :]),
                    "target_reached": network.target_reached(),
                    "best": best,
                    "sparsity_of_model": network.sparsity_of_model(),
                }
            )
            write_csv(out / "history.csv", done.history)
            progress.epoch(done.history[-1])
            if stop.requested or stopping.should_stop:
                done.ended = "interrupted" if stop.requested else "stopped early"
                break
    done.seconds = now(device) - begun
    done.best_epoch = stopping.best_epoch
    if done.kept is None:
        done.kept = (copy.deepcopy(state.model), network.facts())
    return done
