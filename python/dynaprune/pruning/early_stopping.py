"""Early stopping that knows about pruning: when to stop, and which epoch's weights count as the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["EarlyStopping"]

_NOT_ELIGIBLE, _SCHEDULE_ENDED, _TARGET_REACHED = 0, 1, 2


@dataclass
class EarlyStopping:
    """Patience on the validation loss, suspended while a network is still being pruned.

    - Until the target sparsity is reached, or the schedule's ``end`` has passed, no epoch counts as the best
      and none uses up patience. A dense run is eligible from its first epoch.
    - A structural change in an epoch starts patience anew.
    - An epoch that has the target always beats one that only had the schedule's end, whatever its loss;
      within the same standing the lower loss wins. A loss that is not finite never does."""

    patience: int
    best_epoch: int | None = None
    best_loss: float = math.inf
    waited: int = 0
    _standing: int = _NOT_ELIGIBLE

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, got {self.patience}")

    def update(
        self,
        epoch: int,
        loss: float,
        *,
        target_reached: bool,
        schedule_ended: bool,
        structure_changed: bool = False,
    ) -> bool:
        """Take the validation ``loss`` at the end of ``epoch``; True where this epoch is the best so far."""
        standing = _TARGET_REACHED if target_reached else _SCHEDULE_ENDED if schedule_ended else _NOT_ELIGIBLE
        if standing == _NOT_ELIGIBLE:
            self.waited = 0
            return False
        better = math.isfinite(loss) and (
            standing > self._standing or (standing == self._standing and loss < self.best_loss)
        )
        if better:
            self.best_epoch, self.best_loss, self._standing = epoch, loss, standing
        self.waited = 0 if better or structure_changed else self.waited + 1
        return better

    @property
    def should_stop(self) -> bool:
        """True after ``patience`` epochs in a row without a better loss and without a structural change."""
        return self.waited >= self.patience
