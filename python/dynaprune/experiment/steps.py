"""Single training steps of an arm, and what is timed and counted around them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from dynaprune.experiment import metrics
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.tasks import Task, TaskData
from dynaprune.experiment.tasks.data import batches, training_batches
from dynaprune.experiment.tasks.metric import ACCURACY
from dynaprune.nn.to_device import to_device

__all__ = [
    "Evaluation",
    "TrainState",
    "closing_steps",
    "evaluate",
    "evaluate_rows",
    "full_batches",
    "make_optimizer",
    "make_schedule",
    "now",
    "steps_in_turn",
    "time_in_turn",
]

_ROUNDS, _STEPS_PER_ROUND = 8, 5
_EVALUATION_BATCH = 128


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_optimizer(model: nn.Module, config: RunConfig) -> tuple[torch.optim.Optimizer, str]:
    """Adam or AdamW (fused where this torch and device have it) and the name of the implementation."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    try:
        return kind(model.parameters(), fused=True, **settings), f"{kind.__name__}, fused"
    except RuntimeError as reason:
        return kind(model.parameters(), **settings), f"{kind.__name__}, torch's default: {reason}"


def make_schedule(
    optimizer: torch.optim.Optimizer, config: RunConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over ``total_steps`` steps: a linear rise over ``config.warmup_steps``, then
    ``config.schedule``."""
    warmup = min(config.warmup_steps, total_steps - 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
            config.schedule
        ]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass
class TrainState:
    """A model, its optimizer and schedule, and the cost of the steps it has made.

    ``flops_per_sample`` has one entry per measurement: the first step and every first step after a change of
    structure. ``flops_probes`` are those of measuring the dense gradient at dead blocks before events: they
    count in ``flops_total``, and in no step of ``flops_per_sample``."""

    config: RunConfig
    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    step_seconds: list[float] = field(default_factory=list)
    flops_per_sample: list[float] = field(default_factory=list)
    flops_total: float = 0.0
    flops_probes: float = 0.0

    def _forward_backward(self, inputs: Any, targets: torch.Tensor) -> torch.Tensor:
        loss = self.task.losses(self.task.forward(self.model, inputs), targets).mean()
        loss.backward()
        return loss.detach()

    def step(
        self,
        inputs: Any,
        targets: torch.Tensor,
        *,
        count_flops: bool = False,
        probes: bool = False,
        timed: bool = True,
    ) -> torch.Tensor:
        """One training step on a batch of the arm's device: its mean loss, a scalar tensor.

        The FLOPs of forward and backward are counted if asked for, and those of its ``probes``, where it has
        any; such a step is left out of the step times, as one is that is not ``timed``."""
        started = now(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        if count_flops or probes:
            loss, flops, of_probes = metrics.flops_and_probes(lambda: self._forward_backward(inputs, targets))
            self.flops_total += of_probes
            self.flops_probes += of_probes
            if count_flops:
                self.flops_per_sample.append(flops / len(targets))
        else:
            loss = self._forward_backward(inputs, targets)
        if self.config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        if timed and not (count_flops or probes):
            self.step_seconds.append(now(self.device) - started)
        if self.schedule is not None:
            self.schedule.step()
        if self.flops_per_sample:
            self.flops_total += self.flops_per_sample[-1] * len(targets)
        return loss

    def flops_per_step(self, which: int) -> int:
        """FLOPs of a step with a full batch, at the measurement ``which`` (0 the first, -1 the last)."""
        return round(self.flops_per_sample[which] * self.config.batch_size)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss, the task's metrics, and by the name of each metric that is a mean over rows what every row
    adds to it: float32 or uint8 ``[rows]`` on the host."""

    loss: float
    scores: dict[str, float]
    rows: dict[str, torch.Tensor]


def evaluate(
    task: Task,
    model: nn.Module,
    dataset: Dataset[Any],
    device: torch.device,
    collate: Callable[[list[Any]], Any] | None = None,
) -> tuple[float, dict[str, float]]:
    """Mean loss and the task's metrics over ``dataset``, with the model in evaluation mode meanwhile."""
    found = evaluate_rows(task, model, dataset, device, collate)
    return found.loss, found.scores


@torch.no_grad()
def evaluate_rows(
    task: Task,
    model: nn.Module,
    dataset: Dataset[Any],
    device: torch.device,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Evaluation:
    """As `evaluate`, row by row as well."""
    training = model.training
    model.eval()
    # One tensor filled in place: small ones kept between large ones would hold all of the heap.
    losses = torch.empty(len(dataset), dtype=torch.float64, device=device)  # type: ignore[arg-type]
    done = 0
    truth: list[Any] = []
    guess: list[Any] = []
    for inputs, targets in batches(dataset, task.evaluation_batch or _EVALUATION_BATCH, collate=collate):
        outputs = task.forward(model, to_device(inputs, device))
        losses[done : done + len(targets)] = task.losses(outputs, targets.to(device))
        done += len(targets)
        if task.score_of_loss is None:
            predictions = task.predict(outputs)
            truth += targets.tolist()
            guess += predictions.tolist() if isinstance(predictions, torch.Tensor) else predictions
    model.train(training)
    loss = float(losses.mean())
    scores = task.score(truth, guess) if task.score_of_loss is None else task.score_of_loss(loss)
    rows = {}
    for metric in task.metrics:
        if metric.is_loss:
            rows[metric.name] = losses.to("cpu", torch.float32)
        elif metric == ACCURACY:
            rows[metric.name] = torch.tensor(
                [a == b for a, b in zip(truth, guess, strict=True)], dtype=torch.uint8
            )
    return Evaluation(loss, scores, rows)


def full_batches(
    data: TaskData, config: RunConfig, device: torch.device, generator: torch.Generator
) -> Iterator[tuple[Any, torch.Tensor]]:
    """Training batches of full size on ``device``, without end (data smaller than a batch come whole)."""
    full = min(config.batch_size, len(data.train))  # type: ignore[arg-type]
    while True:
        for inputs, targets in training_batches(data, config.batch_size, generator):
            if len(targets) == full:
                yield to_device(inputs, device), targets.to(device)


def closing_steps(state: TrainState, source: Iterator[tuple[Any, torch.Tensor]]) -> dict[str, Any]:
    """Twenty further steps after training, for step time and memory. They change the model: keep what is
    tested before."""
    state.step_seconds = []
    with metrics.memory_peak_from_now(state.device) as peak:
        for _ in range(metrics.STEPS_TIMED):
            state.step(*next(source))
        memory = peak()
    return {"step_seconds_last": metrics.median_seconds(state.step_seconds), "memory_bytes_last": memory}


def time_in_turn(
    state: TrainState, data: TaskData, source: Iterator[tuple[Any, torch.Tensor]]
) -> dict[str, Any]:
    """Medians of 40 steps of the pruned model and 40 of the same network dense, without dropout, five of each
    in turn; the optimizer implementation is the same."""
    twin = state.task.build_model(data, 0.0).to(state.device).train()
    dense = TrainState(state.config, state.task, twin, make_optimizer(twin, state.config)[0], state.device)
    ours, theirs = steps_in_turn(state, dense, source, rounds=_ROUNDS)
    return {"step_seconds_dense": theirs, "step_seconds_last": ours}


def steps_in_turn(
    first: TrainState, second: TrainState, source: Iterator[tuple[Any, torch.Tensor]], *, rounds: int
) -> tuple[float, float]:
    """Medians of the seconds of a step of each: ``rounds`` of five steps in turn on the same batches, after
    a round that is not counted."""
    for round_number in range(rounds + 1):
        taken = [next(source) for _ in range(_STEPS_PER_ROUND)]
        for each in (second, first):
            for inputs, targets in taken:
                each.step(inputs, targets)
        if round_number == 0:
            first.step_seconds, second.step_seconds = [], []
    return statistics.median(first.step_seconds), statistics.median(second.step_seconds)
