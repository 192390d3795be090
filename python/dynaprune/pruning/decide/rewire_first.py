"""The built-in policy of a training that rewires and then gets sparser: one policy after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynaprune.pruning.decide.drop_and_grow import DropAndGrow
from dynaprune.pruning.decide.policy import Policy, View
from dynaprune.pruning.edit.edits import Cut, Grow, Release, Rewire


class RewireFirst(Policy):
    """Rewires until that has ended; another policy removes afterwards, and its trials are those of removals.

    A swap has no trial: a block begins with zero weights, so its harm at once is that of the drop alone, and
    a trial of that would end all exploring. An audit (see ``SwapAudit``) tests drops and decides nothing.
    """

    def __init__(self, rewiring: DropAndGrow, removing: Policy) -> None:
        self._rewiring, self._removing = rewiring, removing
        self.interval = min(rewiring.interval, removing.interval)
        self.trials, self.grows = removing.trials, removing.grows
        self.swaps_by_gradient, self.audit = rewiring.swaps_by_gradient, rewiring.audit

    def due(self, step: int) -> bool:
        return self._now(step).due(step)

    def probes(self, step: int) -> bool:
        return self._now(step).probes(step)

    def ended(self, step: int) -> bool:
        return self._rewiring.ended(step) and self._removing.ended(step)

    def decide(self, view: View) -> Sequence[Release | Grow | Cut | Rewire]:
        return self._now(view.step).decide(view)

    def state_dict(self) -> dict[str, Any]:
        return {**self._removing.state_dict(), **self._rewiring.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._removing.load_state_dict(state)
        self._rewiring.load_state_dict(state)

    def _now(self, step: int) -> Policy:
        return self._rewiring if step <= self._rewiring.until else self._removing
