"""How many units the first candidate set of an event has: what passed lately says where to begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dynaprune.pruning.decide.trial_event import TrialEvent


@dataclass
class Ladder:
    """The size at which the next event begins, by kind of unit; the wish of the pace is never exceeded.

    The first event begins with the wish. After it, an event begins at the size that passed last, at twice
    that where it was the first set of its event, and at half of the smallest one tried where none passed.
    """

    begins: dict[str, int] = field(default_factory=dict)

    def first(self, kind: str, wish: int) -> int:
        """The largest size to try."""
        return min(wish, self.begins.get(kind, wish))

    def note(self, kind: str, event: TrialEvent) -> None:
        """Take in what came of an event; one that tested nothing says nothing."""
        if not event.rungs:
            return
        passed = event.accepted_size
        if passed is None:
            self.begins[kind] = max(1, event.rungs[-1].size // 2)
        elif event.accepted_index == 0:
            # A wish that held the first set down says nothing against a larger one.
            self.begins[kind] = max(2 * passed, self.begins.get(kind, 0))
        else:
            self.begins[kind] = passed

    def state_dict(self) -> dict[str, int]:
        """Plain values."""
        return dict(self.begins)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved state; states of earlier versions have none."""
        self.begins = {kind: int(size) for kind, size in state.items()}
