"""The trials of one run: their rules, what they have spent, and what came of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynaprune.pruning.decide.ladder import Ladder
from dynaprune.pruning.decide.trial import Losses
from dynaprune.pruning.decide.trial_budget import TrialBudget
from dynaprune.pruning.decide.trial_event import TrialEvent, candidate_sizes, run_event
from dynaprune.pruning.decide.trial_rules import TrialRules, TrialState

BLOCKS, NEURONS = "blocks", "neurons"
UNUSABLE_IN_A_ROW = 3


@dataclass
class Trials:
    """Runs trial events under one set of rules.

    Attributes:
        events: of every event its figures, plain values.
        ladder: where candidate sets begin.
        budget: what trials may cost.
    """

    rules: TrialRules
    state: TrialState = field(default_factory=TrialState)
    events: list[dict[str, Any]] = field(default_factory=list)
    ladder: Ladder = field(default_factory=Ladder)
    budget: TrialBudget = field(default_factory=TrialBudget)

    def run(
        self, step: int, wish: int, losses: Callable[[int | None], Losses], kind: str = BLOCKS
    ) -> TrialEvent:
        """Try up to ``wish`` units, then fewer.

        Args:
            kind: of the units, each with a ladder of its own.
            losses: of the model without so many of the least important units; None: as it stands.

        Raises:
            RuntimeError: the third event in a row without usable losses; the first warns.
        """
        sizes = candidate_sizes(self.ladder.first(kind, wish), self.rules.rungs)
        cost: Callable[[], float] = getattr(losses, "cost", lambda: 0.0)
        event = run_event(
            sizes, losses, self.state, self.rules, lambda more: self.budget.allows(step, more, cost())
        )
        self.ladder.note(kind, event)
        self.budget.pay(event.samples, event.evaluated, cost())
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

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values."""
        return {
            "trial_state": self.state.state_dict(),
            "events": list(self.events),
            "ladder": self.ladder.state_dict(),
            "budget": self.budget.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; those of earlier versions have less."""
        self.state.load_state_dict(state["trial_state"])
        self.events = list(state["events"])
        self.ladder.load_state_dict(state.get("ladder", {}))
        self.budget.load_state_dict(state.get("budget", {}))
