"""The memory of an arm by kind, measured on some of its training steps, and that of its process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from dynaprune.experiment import metrics
from dynaprune.experiment.memory_figures import figures_of_steps
from dynaprune.experiment.steps import TrainState, now
from dynaprune.pruning.memory import memory_of_step
from dynaprune.pruning.pruner import Pruner

__all__ = ["MemoryRecord", "stored_bytes"]

# A structure is measured where its weights are so much more than those of any that was, or this share or
# less of the nearest one's.
_MORE, _SHARE = 1.02, 0.8


@dataclass
class MemoryRecord:
    """What was measured of an arm's memory, in all parts of its training.

    Attributes:
        measured: one entry per measured step: its number, the bytes of the weights, and those of
            `dynaprune.StepMemory`.
        seconds: that measured steps took longer than others.
        held_before: bytes that the process held before the model was built; None where nothing tells.
        process_before: the most that earlier parts held beyond that.
    """

    measured: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    held_before: int | None = None
    process_before: int = 0

    def due(self, weights: int) -> bool:
        """Whether a structure with ``weights`` bytes of weights differs enough from those measured so far."""
        sizes = [entry["weights"] for entry in self.measured]
        if not sizes or weights > _MORE * max(sizes):
            return True
        return all(min(size, weights) <= _SHARE * max(size, weights) for size in sizes)

    def measure(
        self, state: TrainState, pruner: Pruner | None, inputs: Any, targets: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, float]:
        """Make training step number ``step`` and measure it: its loss, and how many seconds measuring took.

        It is left out of the step times, and trains the model as any other step does."""
        losses: list[torch.Tensor] = []
        weights, begun = stored_bytes(state.model), now(state.device)
        found = memory_of_step(
            state.model,
            state.optimizer,
            lambda: losses.append(state.step(inputs, targets, timed=False)),
            pruner=pruner,
        )
        spent = now(state.device) - begun
        over = max(spent - (metrics.median_seconds(state.step_seconds[-metrics.STEPS_TIMED :]) or 0.0), 0.0)
        self.seconds += over
        self.measured.append({"step": step, "weights": weights, "peak": found.peak, **asdict(found)})
        return losses[0], over

    def process_bytes(self, device: torch.device) -> int | None:
        """The most that the process held beyond what it held before the model was built."""
        if self.held_before is None:
            return None
        return max(self.process_before, metrics.peak_memory_bytes(device) - self.held_before)

    def figures(self, *, closed: bool) -> dict[str, Any]:
        """What the report says; ``closed``: the last measured step is of the last structure."""
        return {**figures_of_steps(self.measured, closed=closed), "memory_seconds": self.seconds}

    def state_dict(self, device: torch.device) -> dict[str, Any]:
        """Plain values, for the parts to come."""
        return {
            "measured": self.measured,
            "seconds": self.seconds,
            "process": self.process_bytes(device) or 0,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved `state_dict`."""
        self.measured, self.seconds = list(state["measured"]), state["seconds"]
        self.process_before = state["process"]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters as they are stored."""
    return sum(each.numel() * each.element_size() for each in model.parameters())
