"""The trials of one run: their rules, what they have spent, and what came of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dynaprune.pruning.decide.trial import Losses
from dynaprune.pruning.decide.trial_event import TrialEvent, candidate_sizes, run_event
from dynaprune.pruning.decide.trial_rules import TrialRules, TrialState

UNUSABLE_IN_A_ROW = 3


@dataclass
class Trials:
    """Runs trial events under one set of rules.

    Attributes:
        events: of every event its figures, plain values.
    """

    rules: TrialRules
    state: TrialState = field(default_factory=TrialState)
    events: list[dict[str, Any]] = field(default_factory=list)

    def run(self, step: int, wish: int, losses: Callable[[int | None], Losses]) -> TrialEvent:
        """Try ``wish`` units, then fewer.

        Args:
            losses: of the model without so many of the least important units; None: as it stands.

        Raises:
            RuntimeError: the third event in a row without usable losses; the first warns.
        """
        event = run_event(candidate_sizes(wish, self.rules.rungs), losses, self.state, self.rules)
        if not event.usable:
            said = (
                f"the trial at step {step} says nothing: {event.reason}. Nothing is removed on its account. "
                "Look for samples with NaN or infinite values in its data, or for a model that has diverged"
            )
            if self.state.unusable_in_a_row >= UNUSABLE_IN_A_ROW:
                raise RuntimeError(
                    f"{said}. It is the trial number {self.state.unusable_in_a_row} in a row that does"
                )
            if self.state.unusable == 1:
                warnings.warn(said, RuntimeWarning, stacklevel=2)
        return event

    def record(self, step: int, wish: int, passed: int, forced: int, event: TrialEvent) -> None:
        """Note an event's figures and what followed from it."""
        summary = {key: value for key, value in event.as_dict().items() if key != "rungs"}
        p_values = [rung.test.p_value for rung in event.rungs]
        said = {"step": step, "wish": wish, "passed": passed, "forced": forced, "p_values": p_values}
        self.events.append({**said, **summary})
