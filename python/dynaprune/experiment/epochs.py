"""The epochs of an arm's training: all of them, or until early stopping or an interrupt."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import torch

from dynaprune.experiment import metrics
from dynaprune.experiment.arm import Arm, Epoch, Outcome
from dynaprune.experiment.arm_checkpoint import Checkpoints
from dynaprune.experiment.interrupts import StopRequest
from dynaprune.experiment.length import passes
from dynaprune.experiment.memory import stored_bytes
from dynaprune.experiment.progress import EpochProgress
from dynaprune.experiment.steps import evaluate, now
from dynaprune.experiment.tasks.data import Served, training_batches
from dynaprune.experiment.tasks.metric import beside_the_loss
from dynaprune.experiment.write import write_csv
from dynaprune.nn.to_device import to_device

__all__ = ["train_epochs"]


def train_epochs(
    arm: Arm, stop: StopRequest, out: Path, *, checkpoints: Checkpoints | None = None, quiet: bool = False
) -> Outcome:
    """What is left of all epochs, or until early stopping or an interrupt.

    ``history.csv`` is written after every epoch, and a checkpoint too; an interrupt leaves one of the step
    before it."""
    done = arm.done
    if done.history:
        write_csv(out / "history.csv", done.history)
    arm.begun = now(arm.state.device) - done.seconds
    epochs = passes(arm.state.config, len(arm.data.train))  # type: ignore[arg-type]
    metric = beside_the_loss(arm.state.task.metrics)
    with EpochProgress(arm.name, epochs, arm.total_steps, metric, quiet=quiet) as progress:
        progress.advance(done.steps)
        interrupted = False
        while not (arm.over or interrupted):
            whole = _train(arm, stop, checkpoints, progress)
            _evaluate(arm)
            write_csv(out / "history.csv", done.history)
            progress.epoch(done.history[-1])
            if whole and checkpoints is not None:
                checkpoints.write(arm)
            interrupted = stop.requested
    if interrupted:
        done.ended = "interrupted"
    elif arm.stopping.should_stop:
        done.ended = "stopped early"
    done.seconds = now(arm.state.device) - arm.begun
    if done.kept is None:
        done.kept = (copy.deepcopy(arm.state.model), arm.network.facts())
    return done


def _train(arm: Arm, stop: StopRequest, checkpoints: Checkpoints | None, progress: EpochProgress) -> bool:
    """What is left of the epoch under way, or a new one; False where a request to stop has cut it short."""
    state, network, done, device = arm.state, arm.network, arm.done, arm.state.device
    if arm.epoch is None:
        arm.epoch = Epoch(arm.order.get_state(), network.version(), torch.zeros((), device=device))
    epoch = arm.epoch
    served = Served(epoch.batches, epoch.began, arm.order.get_state()) if epoch.batches else None
    left = training_batches(arm.data, state.config.batch_size, arm.order, served)
    for inputs, targets in itertools.islice(left, arm.total_steps - done.steps):
        inputs, targets = to_device(inputs, device), targets.to(device)
        changed = network.version() != arm.measured_version
        arm.measured_version = network.version()
        probes = network.probes()
        if not (changed or probes) and _memory_due(arm, len(targets)):
            loss, over = arm.memory.measure(state, network.pruner, inputs, targets, done.steps + 1)
            arm.leave_out(over)
        else:
            loss = state.step(inputs, targets, count_flops=changed, probes=probes)
        epoch.loss_sum += loss * len(targets)
        epoch.seen += len(targets)
        epoch.batches += 1
        done.steps += 1
        network.after_step(done.steps)
        progress.advance()
        if checkpoints is not None and (stop.requested or checkpoints.due()):
            checkpoints.write(arm)
        if stop.requested:
            return False
    return True


def _memory_due(arm: Arm, samples: int) -> bool:
    """Whether the next step, on ``samples`` samples, is one to measure.

    That is a step on a whole batch, without the work of an event, of an optimizer that has a state already
    and has been timed."""
    whole = samples == min(arm.state.config.batch_size, len(arm.data.train))  # type: ignore[arg-type]
    if not whole or not arm.state.step_seconds or arm.network.event_next():
        return False
    return arm.memory.due(stored_bytes(arm.state.model))


def _evaluate(arm: Arm) -> None:
    """Close the epoch under way: its row of the history, and the model where it is the best so far."""
    state, network, done, epoch = arm.state, arm.network, arm.done, arm.epoch
    assert epoch is not None
    if len(done.first_steps) < metrics.STEPS_TIMED:
        done.first_steps = state.step_seconds[: metrics.STEPS_TIMED]
    network.before_evaluation()
    validation_loss, scores = evaluate(
        state.task, state.model, arm.data.validation, state.device, arm.data.collate
    )
    number = len(done.history) + 1
    best = arm.stopping.update(
        number,
        validation_loss,
        standing=network.final_standing(),
        structure_changed=network.version() != epoch.version,
    )
    if best:
        done.kept, done.best_epoch = (copy.deepcopy(state.model), network.facts()), number
    done.history.append(
        {
            "arm": arm.name,
            "epoch": number,
            "step": done.steps,
            "seconds": now(state.device) - arm.begun,
            "train_loss": float(epoch.loss_sum) / epoch.seen,
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
    arm.epoch = None
