"""What an arm is: its name, its own settings, and whether it is pruned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dynaprune.experiment.length import total_steps, with_steps
from dynaprune.experiment.run_config import PILOT_LENGTH, RunConfig

__all__ = ["BASELINE", "PRUNED", "ArmSettings", "shortened_for_pilot"]

BASELINE, PRUNED = "baseline", "pruned"


@dataclass(frozen=True)
class ArmSettings:
    """One arm of a comparison.

    Attributes:
        name: of its folder, and in reports and tables.
        config: its own settings.
        pruned: whether `dynaprune.attach` makes it smaller; otherwise it stays dense.
        plan: what the report says of how a control came to its settings.
    """

    name: str
    config: RunConfig
    pruned: bool
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def dropout(self) -> float:
        """Dropout of the arm's network; a pruned one has none."""
        return 0.0 if self.pruned else self.config.dropout


def shortened_for_pilot(config: RunConfig, rows: int) -> RunConfig:
    """The settings of a pilot: a third of the steps, and the schedule with them."""
    return with_steps(config, max(1, round(PILOT_LENGTH * total_steps(config, rows))), rows)
