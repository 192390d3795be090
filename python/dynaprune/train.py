"""Train one arm of a comparison, dense or pruned, in this process, and measure it.

``python -m dynaprune.train CONFIG.json --arm pruned --out DIR`` is what ``dynaprune compare`` starts for each arm.
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from dynaprune import metrics
from dynaprune.early_stopping import EarlyStopping
from dynaprune.progress import EpochProgress
from dynaprune.report import write_csv, write_json
from dynaprune.run_config import RunConfig
from dynaprune.structure import DenseStructure, PrunedStructure
from dynaprune.tasks import Task, TaskData, get_task
from dynaprune.tasks.data import batches, batches_per_epoch

__all__ = ["ARMS", "main", "run_arm"]

ARMS = ("baseline", "pruned")
_TIMED_ROUNDS, _STEPS_PER_ROUND = 8, 5


def make_optimizer(model: nn.Module, config: RunConfig) -> tuple[torch.optim.Optimizer, str]:
    """Adam (fused where this torch and device have it) and the name of the implementation."""
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    try:
        return torch.optim.Adam(model.parameters(), fused=True, **settings), "adam, fused"
    except RuntimeError:
        return torch.optim.Adam(model.parameters(), **settings), "adam, torch's default"


@dataclass
class _Stop:
    """Set by the first SIGINT or SIGTERM; a second SIGINT ends the process at once."""

    requested: bool = False

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._take)
            signal.signal(signal.SIGTERM, self._take)

    def _take(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@dataclass
class _Measured:
    """What the steps of an arm cost."""

    step_seconds: list[float] = field(default_factory=list)
    flops_per_sample: list[float] = field(default_factory=list)
    flops_total: float = 0.0


@dataclass
class _Arm:
    """One arm while it trains."""

    config: RunConfig
    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    measured: _Measured = field(default_factory=_Measured)

    def loss(self, inputs: Any, targets: torch.Tensor) -> torch.Tensor:
        loss = self.task.losses(self.task.forward(self.model, inputs), targets).mean()
        loss.backward()
        return loss.detach()

    def step(self, inputs: Any, targets: torch.Tensor, count_flops: bool = False) -> torch.Tensor:
        """One training step: its mean loss. A step whose FLOPs are counted is left out of the step times."""
        started = _now(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        if count_flops:
            loss, flops = metrics.flops_of(lambda: self.loss(inputs, targets))
            self.measured.flops_per_sample.append(flops / len(targets))
        else:
            loss = self.loss(inputs, targets)
        self.optimizer.step()
        if not count_flops:
            self.measured.step_seconds.append(_now(self.device) - started)
        self.measured.flops_total += self.measured.flops_per_sample[-1] * len(targets)
        return loss


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def to_device(value: Any, device: torch.device) -> Any:
    """The batch (a tensor, or a dict, list or tuple of them) on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    return value


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, dataset: Dataset[Any], device: torch.device, batch_size: int = 256
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean loss, true classes ``[n]`` and predicted classes ``[n]``, with the model in evaluation mode meanwhile."""
    training = model.training
    model.eval()
    losses, truth, guess = [], [], []
    for inputs, targets in batches(dataset, batch_size):
        inputs, targets = to_device(inputs, device), targets.to(device)
        outputs = task.forward(model, inputs)
        losses.append(task.losses(outputs, targets).double())
        truth.append(targets)
        guess.append(outputs.argmax(dim=-1))
    model.train(training)
    return float(torch.cat(losses).mean()), torch.cat(truth), torch.cat(guess)


def _endless(data: TaskData, config: RunConfig, generator: torch.Generator) -> Iterator[tuple[Any, torch.Tensor]]:
    """Training batches of full size, pass after pass (a data set smaller than a batch gives what it has)."""
    full = min(config.batch_size, len(data.train))  # type: ignore[arg-type]
    while True:
        for inputs, targets in batches(data.train, config.batch_size, generator):
            if len(targets) == full:
                yield inputs, targets


def _closing_steps(arm: _Arm, source: Iterator[tuple[Any, torch.Tensor]]) -> dict[str, Any]:
    """``STEPS_TIMED`` further steps after training, for time and memory: the weights that are tested were kept before."""
    arm.measured.step_seconds = []
    with metrics.memory_peak_from_now(arm.device) as peak:
        for _ in range(metrics.STEPS_TIMED):
            inputs, targets = next(source)
            arm.step(to_device(inputs, arm.device), targets.to(arm.device))
        memory = peak()
    return {
        "step_seconds_last": metrics.median_seconds(arm.measured.step_seconds),
        "memory_bytes_last": memory,
        "training_state": metrics.training_state_bytes(arm.model, arm.optimizer),
    }


def _time_in_turn(arm: _Arm, data: TaskData, source: Iterator[tuple[Any, torch.Tensor]]) -> dict[str, Any]:
    """Medians of steps of the pruned model and of the same network dense (no dropout), a few of each in turn."""
    twin = arm.task.build_model(data, 0.0).to(arm.device).train()
    dense = _Arm(arm.config, arm.task, twin, make_optimizer(twin, arm.config)[0], arm.device)
    dense.measured.flops_per_sample.append(0.0)
    for each in (dense, arm):
        each.measured.step_seconds = []
    for round_number in range(_TIMED_ROUNDS + 1):
        for each in (dense, arm):
            for _ in range(_STEPS_PER_ROUND):
                inputs, targets = next(source)
                each.step(to_device(inputs, arm.device), targets.to(arm.device))
        if round_number == 0:
            dense.measured.step_seconds, arm.measured.step_seconds = [], []
    return {
        "step_seconds_dense": metrics.median_seconds(dense.measured.step_seconds),
        "step_seconds_last": metrics.median_seconds(arm.measured.step_seconds),
    }


def run_arm(config: RunConfig, arm_name: str, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Train and test one arm; write ``arm.json``, ``history.csv`` and the arm's structure over time into ``out``.

    A SIGINT ends training after the current step; what was trained is tested and written with ``interrupted`` true.
    """
    if arm_name not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm_name!r}")
    stop = _Stop()
    stop.listen()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(config.device)
    task = get_task(config.task)
    data = task.load(config.split())
    pruned = arm_name == "pruned"

    memory_before_model = metrics.peak_memory_bytes(device) if device.type == "cuda" else metrics.resident_bytes()
    torch.manual_seed(config.model_seed)
    model = task.build_model(data, 0.0 if pruned else config.dropout).to(device).train()
    optimizer, implementation = make_optimizer(model, config)
    arm = _Arm(config, task, model, optimizer, device)
    order = torch.Generator().manual_seed(config.model_seed)
    steps = config.epochs * batches_per_epoch(data.train, config.batch_size)
    structure: DenseStructure
    if pruned:
        structure = PrunedStructure(model, optimizer, config, task, data.train, total_steps=steps)
    else:
        structure = DenseStructure(model)

    stopping = EarlyStopping(config.patience)
    kept: tuple[nn.Module, dict[str, Any]] | None = None
    history: list[dict[str, Any]] = []
    step, version, state = 0, None, "ran all epochs"
    first_steps: list[float] = []
    progress = EpochProgress(arm_name, config.epochs, steps, quiet=quiet)
    begun = _now(device)
    with progress:
        for epoch in range(1, config.epochs + 1):
            version_before, total, seen = structure.version(), torch.zeros((), device=device), 0
            for inputs, targets in batches(data.train, config.batch_size, order):
                inputs, targets = to_device(inputs, device), targets.to(device)
                changed = structure.version() != version
                version = structure.version()
                loss = arm.step(inputs, targets, count_flops=changed)
                total += loss * len(targets)
                seen += len(targets)
                step += 1
                structure.after_step(step)
                progress.advance()
                if stop.requested:
                    break
            if len(first_steps) < metrics.STEPS_TIMED:
                first_steps = arm.measured.step_seconds[: metrics.STEPS_TIMED]
            validation_loss, truth, guess = evaluate(task, model, data.validation, device)
            row = {
                "arm": arm_name,
                "epoch": epoch,
                "step": step,
                "seconds": _now(device) - begun,
                "train_loss": float(total) / seen,
                "validation_loss": validation_loss,
                "validation_accuracy": float((truth == guess).double().mean()),
                "sparsity": structure.sparsity(),
                "parameters_active": structure.parameters_active(),
                "flops_per_step": round(arm.measured.flops_per_sample[-1] * config.batch_size),
                "step_seconds": metrics.median_seconds(arm.measured.step_seconds[-metrics.STEPS_TIMED :]),
                "best": False,
            }
            history.append(row)
            row["best"] = stopping.update(
                epoch,
                validation_loss,
                target_reached=structure.target_reached(),
                schedule_ended=structure.schedule_ended(step),
                structure_changed=structure.version() != version_before,
            )
            if row["best"]:
                kept = (copy.deepcopy(model), structure.facts())
            write_csv(out / "history.csv", history)
            progress.epoch(row)
            if stop.requested:
                state = "interrupted"
                break
            if stopping.should_stop:
                state = "stopped early"
                break
    seconds = _now(device) - begun

    if kept is None:
        kept = (copy.deepcopy(model), structure.facts())
    peak = metrics.peak_memory_bytes(device)
    flops = arm.measured.flops_per_sample
    last_steps = arm.measured.step_seconds[-metrics.STEPS_TIMED :]
    result: dict[str, Any] = {
        "train_seconds": seconds,
        "epochs": len(history),
        "steps": step,
        "state": state,
        "interrupted": stop.requested,
        "best_epoch": stopping.best_epoch,
        "step_seconds_first": metrics.median_seconds(first_steps),
        "step_seconds_last": metrics.median_seconds(last_steps),
        "peak_memory_bytes": peak,
        "memory_bytes_before_model": memory_before_model,
        "flops_per_step_first": round(flops[0] * config.batch_size),
        "flops_per_step_last": round(flops[-1] * config.batch_size),
        "flops_total": round(arm.measured.flops_total + structure.trial_flops()),
        "flops_trials": round(structure.trial_flops()),
        "optimizer": implementation,
        "data": data.description,
        **structure.end_of_training(),
    }
    source = _endless(data, config, order)
    arm.measured.flops_per_sample = [0.0]
    if stop.requested:
        with metrics.memory_peak_from_now(device) as now:
            result["memory_bytes_last"] = now()
        result["training_state"] = metrics.training_state_bytes(model, optimizer)
    else:
        result.update(_closing_steps(arm, source))
    result["training_state_bytes"] = result["training_state"]["total"]
    if pruned:
        result["step_seconds_dense"] = None
        if not stop.requested:
            result["step_seconds_last_alone"] = result["step_seconds_last"]
            result.update(_time_in_turn(arm, data, source))

    tested, facts = kept
    result.update(facts)
    test_loss, truth, guess = evaluate(task, tested, data.test, device)
    result["test_loss"] = test_loss
    result["test_accuracy"], result["test_f1"] = metrics.accuracy_and_f1(truth, guess, task.f1_average)
    structure.write(out)
    write_json(out / "arm.json", {"arm": arm_name, "environment": metrics.environment(device), "result": result})
    return result


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the arm's process. Returns 0; 2 for wrong input (said on stderr), 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m dynaprune.train", description=main.__doc__)
    parser.add_argument("config", type=Path, help="JSON with the fields of RunConfig")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args(arguments)
    return exit_code(lambda: run_arm(RunConfig.read(given.config), given.arm, given.out, quiet=given.quiet))


def exit_code(run: Callable[[], dict[str, Any]]) -> int:
    """Run an arm and turn wrong input into a message and 2, an interrupt into 130."""
    try:
        result = run()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, (OSError, ImportError, ValueError)):
            print(f"error: {error}", file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        return 130
    return 130 if result["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
