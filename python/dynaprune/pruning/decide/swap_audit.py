"""The audit of swaps: what a trial would have said of blocks that go without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dynaprune.pruning.decide.allocation import Selection
from dynaprune.pruning.decide.by_size import BySize
from dynaprune.pruning.decide.trial import Losses
from dynaprune.pruning.decide.trial_event import candidate_sizes, run_event
from dynaprune.pruning.decide.trial_rules import TrialRules, TrialState


class SwapAudit:
    """Tests the drops of some events of rewiring by the trial of a removal; they go whatever it says.

    A drop counts as failed where it is not in the largest candidate set that passes. Events have the
    tolerance of a removal each and no allowance in common: training makes up for a swap, and the allowance of
    the removals that come later stays whole.

    Attributes:
        events: of every audited event its figures, plain values.
    """

    def __init__(self, rules: TrialRules, wanted: int, among: int) -> None:
        """Audit ``wanted`` of ``among`` events, evenly spread; all where there are no more."""
        self._rules, self._state = rules, TrialState()
        wanted = min(wanted, among)
        self._numbers = {(2 * i + 1) * among // (2 * wanted) + 1 for i in range(wanted)}
        self.events: list[dict[str, Any]] = []

    def due(self, number: int) -> bool:
        """Whether event ``number`` of the rewiring, from 1, is audited."""
        return number in self._numbers

    def run(self, step: int, drops: Selection, losses: Callable[[Mapping[str, Tensor]], Losses]) -> None:
        """Test the ``drops`` of an event, all, then half and a quarter of them, and note what came of it.

        Args:
            losses: per-sample losses with the blocks of masks suspended, ``{}`` for the model as it stands.
        """
        self._state.spent = 0.0
        event = run_event(
            candidate_sizes(len(drops), self._rules.rungs),
            BySize(losses, lambda count: drops.first(count) if count else {}),
            self._state,
            self._rules,
        )
        figures = {key: value for key, value in event.as_dict().items() if key not in _OF_REMOVALS}
        tested = len(drops) if event.rungs else 0
        failed = tested - (event.accepted_size or 0)
        p_values = [rung.test.p_value for rung in event.rungs]
        said = {"step": step, "dropped": len(drops), "tested": tested, "failed": failed}
        self.events.append({**said, "p_values": p_values, **figures})

    def report(self) -> dict[str, Any]:
        """Counts over all audited events, and the events: plain values, fit for JSON."""
        return {
            "count": len(self.events),
            "failed": sum(event["failed"] > 0 for event in self.events),
            "blocks_tested": sum(event["tested"] for event in self.events),
            "blocks_failed": sum(event["failed"] for event in self.events),
            "seconds": self._state.seconds,
            "events": [dict(event) for event in self.events],
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"trial_state": self._state.state_dict(), "events": list(self.events)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved `state_dict`."""
        self._state.load_state_dict(dict(state["trial_state"]))
        self.events = list(state["events"])


_OF_REMOVALS = ("rungs", "charged", "allowance_left", "accepted_index", "accepted_size")
