"""Early stopping that knows about pruning: when to stop, and which epoch's weights count as the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["EarlyStopping"]


@dataclass
class EarlyStopping:
    """Patience on the validation loss, suspended while a network is still being pruned.

    How final a network is has a number, its standing (see `Pruner.final_standing`): 0 while it is being
    pruned, 1 from the schedule's ``end`` on, 2 with the target sparsity reached. A dense run has 2.

    - At standing 0 no epoch counts as the best and none uses up patience.
    - A structural change in an epoch starts patience anew.
    - An epoch of a higher standing always beats one of a lower, whatever its loss; within the same standing
      the lower loss wins. A loss that is not finite never does."""

    patience: int
    best_epoch: int | None = None
    best_loss: float = math.inf
    waited: int = 0
    _standing: int = 0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, got {self.patience}")

    def update(self, epoch: int, loss: float, *, standing: int, structure_changed: bool = False) -> bool:
        """Take the validation ``loss`` at the end of ``epoch``; True where this epoch is the best so far.

        ValueError for a ``standing`` that is not 0, 1 or 2."""
        if standing not in (0, 1, 2):
            raise ValueError(f"expected a standing of 0, 1 or 2, got {standing!r}")
        if standing == 0:
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
