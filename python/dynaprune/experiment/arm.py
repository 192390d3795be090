"""An arm in training, as one value: everything that its next step and its report depend on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dynaprune.experiment.length import total_steps
from dynaprune.experiment.memory import MemoryRecord
from dynaprune.experiment.network import DenseNetwork
from dynaprune.experiment.steps import TrainState
from dynaprune.experiment.tasks import TaskData
from dynaprune.pruning.early_stopping import EarlyStopping

__all__ = ["Arm", "Epoch", "Outcome"]


@dataclass
class Outcome:
    """What an arm's training left behind. ``kept`` is the best model with its structure, and what was said of
    it; ``seconds`` are those of all its parts, without the writing of checkpoints."""

    history: list[dict[str, Any]] = field(default_factory=list)
    kept: tuple[nn.Module, dict[str, Any]] | None = None
    best_epoch: int | None = None
    first_steps: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    ended: str = "ran all epochs"


@dataclass
class Epoch:
    """An epoch under way.

    Attributes:
        began: state of the order's generator before its first batch.
        version: of the network's structure then.
        loss_sum: scalar tensor, over the ``seen`` samples of the ``batches`` that were trained on.
    """

    began: torch.Tensor
    version: int
    loss_sum: torch.Tensor
    batches: int = 0
    seen: int = 0


@dataclass
class Arm:
    """An arm in training. Its random states are the process's own and ``order``'s.

    Attributes:
        state: model, optimizer, schedule, and what the steps have cost.
        network: the model as the loop sees it, with the pruner.
        order: of the training batches and their augmentation.
        epoch: None between two epochs.
        measured_version: the network's structure when FLOPs were counted last.
        begun: on the clock of `steps.now`, when the training began, had it never paused.
        peak_before: peak memory in bytes of the earlier parts of this training.
        memory: by kind, as far as it was measured.
        notes: what the report says of what came before the training.
    """

    name: str
    state: TrainState
    data: TaskData
    network: DenseNetwork
    order: torch.Generator
    stopping: EarlyStopping
    done: Outcome = field(default_factory=Outcome)
    epoch: Epoch | None = None
    measured_version: int | None = None
    begun: float = 0.0
    peak_before: int = 0
    memory: MemoryRecord = field(default_factory=MemoryRecord)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return total_steps(self.state.config, len(self.data.train))  # type: ignore[arg-type]

    @property
    def over(self) -> bool:
        """Whether all steps are done and evaluated, or early stopping has ended them."""
        return (self.epoch is None and self.done.steps >= self.total_steps) or self.stopping.should_stop

    def leave_out(self, seconds: float) -> None:
        """Count ``seconds`` that have just passed as no time of the training."""
        self.begun += seconds
        self.network.leave_out(seconds)
