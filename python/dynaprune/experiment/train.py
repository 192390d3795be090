"""Train one arm of a comparison, dense or pruned, in this process, and measure it.

``python -m dynaprune.experiment.train CONFIG.json --arm pruned --out DIR`` is what ``dynaprune compare``
starts for each arm."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynaprune.experiment import metrics
from dynaprune.experiment.arm import DenseStructure, PrunedStructure
from dynaprune.experiment.progress import EpochProgress
from dynaprune.experiment.report import write_csv, write_json
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.sole_writer import FolderInUse, end_with_parent, sole_writer
from dynaprune.experiment.steps import (
    Arm,
    closing_steps,
    evaluate,
    full_batches,
    make_optimizer,
    make_schedule,
    now,
    time_in_turn,
    to_device,
)
from dynaprune.experiment.tasks import Task, TaskData, get_task
from dynaprune.experiment.tasks.data import batches_per_epoch, training_batches
from dynaprune.pruning.early_stopping import EarlyStopping
from dynaprune.saving.durable import cannot_write
from dynaprune.saving.tensor_file import read_tensors, write_tensors

__all__ = ["ARMS", "CannotStart", "main", "run_arm"]

ARMS = ("baseline", "pruned")


class CannotStart(Exception):
    """The data or the initial weights cannot be read, or the settings do not fit the model; the message says
    what was expected and what came."""


@dataclass
class _Stop:
    """While entered: the first SIGINT and any SIGTERM are requests to stop, a second SIGINT ends the process
    at once."""

    requested: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@dataclass
class _Training:
    """What an arm's training left behind. ``kept`` is the best model with its structure, and what was said of
    it."""

    history: list[dict[str, Any]] = field(default_factory=list)
    kept: tuple[nn.Module, dict[str, Any]] | None = None
    best_epoch: int | None = None
    first_steps: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    state: str = "ran all epochs"


def _train(
    arm: Arm,
    arm_name: str,
    data: TaskData,
    structure: DenseStructure,
    order: torch.Generator,
    stop: _Stop,
    out: Path,
    quiet: bool,
) -> _Training:
    """All epochs, or until early stopping or an interrupt; ``history.csv`` is written after every epoch."""
    config, device = arm.config, arm.device
    done = _Training()
    stopping = EarlyStopping(config.patience)
    total_steps = config.epochs * batches_per_epoch(data.train, config.batch_size)
    measured_version: int | None = None
    begun = now(device)
    with EpochProgress(arm_name, config.epochs, total_steps, quiet=quiet) as progress:
        for epoch in range(1, config.epochs + 1):
            version_before, loss_sum, seen = structure.version(), torch.zeros((), device=device), 0
            for inputs, targets in training_batches(data, config.batch_size, order):
                inputs, targets = to_device(inputs, device), targets.to(device)
                changed = structure.version() != measured_version
                measured_version = structure.version()
                loss_sum += arm.step(inputs, targets, count_flops=changed) * len(targets)
                seen += len(targets)
                done.steps += 1
                structure.after_step(done.steps)
                progress.advance()
                if stop.requested:
                    break
            if len(done.first_steps) < metrics.STEPS_TIMED:
                done.first_steps = arm.step_seconds[: metrics.STEPS_TIMED]
            structure.before_evaluation()
            validation_loss, scores = evaluate(arm.task, arm.model, data.validation, device, data.collate)
            best = stopping.update(
                epoch,
                validation_loss,
                target_reached=structure.target_reached(),
                schedule_ended=structure.schedule_ended(),
                structure_changed=structure.version() != version_before,
            )
            if best:
                done.kept = (copy.deepcopy(arm.model), structure.facts())
            done.history.append(
                {
                    "arm": arm_name,
                    "epoch": epoch,
                    "step": done.steps,
                    "seconds": now(device) - begun,
                    "train_loss": float(loss_sum) / seen,
                    "validation_loss": validation_loss,
                    **{f"validation_{name}": value for name, value in scores.items()},
                    "sparsity": structure.sparsity(),
                    "parameters_active": structure.parameters_active(),
                    "flops_per_step": arm.flops_per_step(-1),
                    "step_seconds": metrics.median_seconds(arm.step_seconds[-metrics.STEPS_TIMED :]),
                    "target_reached": structure.target_reached(),
                    "best": best,
                    "sparsity_of_model": structure.sparsity_of_model(),
                }
            )
            write_csv(out / "history.csv", done.history)
            progress.epoch(done.history[-1])
            if stop.requested or stopping.should_stop:
                done.state = "interrupted" if stop.requested else "stopped early"
                break
    done.seconds = now(device) - begun
    done.best_epoch = stopping.best_epoch
    if done.kept is None:
        done.kept = (copy.deepcopy(arm.model), structure.facts())
    return done


def _costs(
    arm: Arm, done: _Training, structure: DenseStructure, data: TaskData, order: torch.Generator
) -> dict[str, Any]:
    """Time, memory and FLOPs of the arm; after an interrupt without the closing steps."""
    found: dict[str, Any] = {
        "train_seconds": done.seconds,
        "epochs": len(done.history),
        "steps": done.steps,
        "state": done.state,
        "interrupted": done.state == "interrupted",
        "best_epoch": done.best_epoch,
        "step_seconds_first": metrics.median_seconds(done.first_steps),
        "step_seconds_last": metrics.median_seconds(arm.step_seconds[-metrics.STEPS_TIMED :]),
        "peak_memory_bytes": metrics.peak_memory_bytes(arm.device),
        "flops_per_step_first": arm.flops_per_step(0),
        "flops_per_step_last": arm.flops_per_step(-1),
        "flops_total": round(arm.flops_total + structure.trial_flops()),
        "flops_trials": round(structure.trial_flops()),
        **structure.end_of_training(),
    }
    source = full_batches(data, arm.config, arm.device, order)
    pruned = isinstance(structure, PrunedStructure)
    if pruned:
        found["step_seconds_dense"] = None
    if found["interrupted"]:
        with metrics.memory_peak_from_now(arm.device) as held:
            found["memory_bytes_last"] = held()
    else:
        found.update(closing_steps(arm, source))
        # The peak was reset for the closing steps, and they may exceed what came before.
        found["peak_memory_bytes"] = max(found["peak_memory_bytes"], found["memory_bytes_last"] or 0)
    found["training_state"] = metrics.training_state_bytes(arm.model, arm.optimizer)
    found["training_state_bytes"] = found["training_state"]["total"]
    if pruned and not found["interrupted"]:
        found["step_seconds_last_alone"] = found["step_seconds_last"]
        found.update(time_in_turn(arm, data, source))
    return found


def _pretrained(
    task: Task, model: nn.Module, data: TaskData, config: RunConfig, device: torch.device, file: Path
) -> dict[str, Any]:
    """Pretrains the fresh model where the settings ask for it, or takes the weights that the other arm left
    in ``file``. Returns what the report says of it."""
    if not config.options.get("pretrain_epochs"):
        return {}
    if task.pretrain is None:
        raise CannotStart(f"{task.name} has no pretraining, got pretrain_epochs")
    notes = file.with_suffix(".json")
    if not (file.is_file() and notes.is_file()):
        begun = now(device)
        said = task.pretrain(model, data, config, device)
        said["pretrain_seconds"] = now(device) - begun
        write_tensors(file, model.state_dict(), {})
        write_json(notes, said)
    try:
        model.load_state_dict(read_tensors(file).tensors)
    except (ValueError, RuntimeError) as error:
        raise CannotStart(f"expected the weights of a pretraining in {file}: {error}") from error
    torch.manual_seed(config.model_seed)
    return dict(json.loads(notes.read_text()))


def run_arm(
    config: RunConfig, arm_name: str, out: Path, *, quiet: bool = False, pretrained: Path | None = None
) -> dict[str, Any]:
    """Train and test one arm; write ``arm.json``, ``history.csv`` and the structure over time into ``out``.

    ``pretrained`` is where the weights of a pretraining are kept or taken from (``out`` where not given).

    A SIGINT ends training after the current step; what was trained is then tested and written,
    ``interrupted`` true.

    Raises:
        ValueError: an unknown arm, or another process writes ``out``.
        OSError: ``out`` cannot be written.
        CannotStart: data that cannot be read, settings that the pruner refuses for this model."""
    if arm_name not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm_name!r}")
    with sole_writer(out), _Stop() as stop, _denormals_flushed():
        file = pretrained if pretrained is not None else out / "pretrained.safetensors"
        return _run(config, arm_name, out, quiet, stop, file)


@contextlib.contextmanager
def _denormals_flushed() -> Iterator[None]:
    """L2 decays the weights of dead units into denormals, and fused Adam takes four times as long with them.

    A thread that starts inherits the setting, so it comes before torch's own threads do. numpy works out once
    what its smallest numbers are, and warns where they are flushed: it does so before."""
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _run(
    config: RunConfig, arm_name: str, out: Path, quiet: bool, stop: _Stop, pretrained_file: Path
) -> dict[str, Any]:
    device = torch.device(config.device)
    task = get_task(config.task)
    try:
        data = task.load(config.split(), config.options)
    except (ValueError, OSError, ImportError) as error:
        raise CannotStart(str(error)) from error
    held_before = metrics.held_bytes(device)

    pruned = arm_name == "pruned"
    torch.manual_seed(config.model_seed)
    try:
        model = task.build_model(data, 0.0 if pruned else config.dropout).to(device).train()
    except (ValueError, OSError, ImportError) as error:
        raise CannotStart(str(error)) from error
    pretrained = _pretrained(task, model, data, config, device, pretrained_file)
    optimizer, implementation = make_optimizer(model, config)
    total_steps = config.epochs * batches_per_epoch(data.train, config.batch_size)
    schedule = make_schedule(optimizer, config, total_steps)
    arm = Arm(config, task, model, optimizer, device, schedule)
    order = torch.Generator().manual_seed(config.model_seed)
    structure: DenseStructure
    try:
        structure = PrunedStructure(arm, data) if pruned else DenseStructure(model)
    except (ValueError, TypeError) as error:
        raise CannotStart(str(error)) from error

    done = _train(arm, arm_name, data, structure, order, stop, out, quiet)
    assert done.kept is not None
    tested, facts = done.kept
    test_loss, scores = evaluate(task, tested, data.test, device, data.collate)
    structure.write(out, tested)
    result = {
        **{f"test_{name}": value for name, value in scores.items()},
        "test_loss": test_loss,
        **pretrained,
        **_costs(arm, done, structure, data, order),
        **facts,
        "memory_bytes_before_model": held_before,
        "optimizer": implementation,
        "data": data.description,
    }
    write_json(
        out / "arm.json", {"arm": arm_name, "environment": metrics.environment(device), "result": result}
    )
    return result


def exit_code(run: Callable[[], dict[str, Any]]) -> int:
    """Run an arm: 0, or 2 where it cannot start, 3 where it cannot write its files (both said in one line on
    stderr), or 130 after an interrupt."""
    try:
        result = run()
    except (CannotStart, FolderInUse) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {cannot_write(error)}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    return 130 if result["interrupted"] else 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point of an arm's process; the return value is its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dynaprune.experiment.train", description=__doc__)
    parser.add_argument("config", type=Path, help="JSON with the fields of RunConfig")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--pretrained", type=Path, help="weights of a pretraining: kept or taken here")
    parser.add_argument("--parent", type=int, help="end with this process, the parent")
    given = parser.parse_args(arguments)
    if given.parent is not None:
        end_with_parent(given.parent)
    try:
        config = RunConfig.read(given.config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return exit_code(
        lambda: run_arm(config, given.arm, given.out, quiet=given.quiet, pretrained=given.pretrained)
    )


if __name__ == "__main__":
    sys.exit(main())
