"""How large an arm's network is while it trains: the one place where the training loop meets the pruner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from dynaprune.run_config import RunConfig

__all__ = ["DenseStructure"]


class DenseStructure:
    """A network that keeps its size: the baseline arm."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = sum(p.numel() for p in model.parameters())

    def version(self) -> int:
        """Changes whenever the network's structure does."""
        return 0

    def after_step(self, step: int) -> None:
        """Called after every training step."""

    def target_reached(self) -> bool:
        """Whether the network is as small as it was to become."""
        return True

    def schedule_ended(self, step: int) -> bool:
        """Whether the pruning schedule is over at ``step``."""
        return True

    def sparsity(self) -> float:
        """Share of the prunable weights that are gone."""
        return 0.0

    def parameters_active(self) -> int:
        """Number of live parameter values."""
        return self.parameters

    def trial_flops(self) -> float:
        """FLOPs spent in trials so far."""
        return 0.0

    def facts(self) -> dict[str, Any]:
        """What the report says of the network as it is now."""
        return {"parameters_total": self.parameters, "parameters_active": self.parameters_active()}

    def end_of_training(self) -> dict[str, Any]:
        """What the report says of the whole training."""
        return {}

    def write(self, out: Path, tested: nn.Module) -> None:
        """Write what the pictures need, and the tested model, into ``out``."""
