"""The built-in policy for whole neurons: as many as the pace wishes for, what passes the trial first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dynaprune.pruning.decide.by_size import BySize
from dynaprune.pruning.decide.neuron_choice import Choice, Unit, choose, in_order
from dynaprune.pruning.decide.pace import PaceWithInterval
from dynaprune.pruning.decide.policy import Policy, View, WholeNeurons
from dynaprune.pruning.decide.trial_budget import TrialBudget
from dynaprune.pruning.decide.trial_rules import TrialRules
from dynaprune.pruning.decide.trials import NEURONS, Trials
from dynaprune.pruning.edit.edits import FORCED, PASSED, UNTESTED, Cut

_TRIES = 4


class GradualNeurons(Policy):
    """Removes whole neurons until as many weights (or forward FLOPs) are gone as the pace wishes for.

    What passes the trial goes; the pace says what goes all the same. Without a trial everything goes
    untested.
    """

    def __init__(
        self,
        pace: PaceWithInterval,
        rules: TrialRules,
        budget: TrialBudget | None = None,
        *,
        allocation: str = "global",
        share: float = 1.0,
    ) -> None:
        """Decide by these settings.

        Args:
            budget: of the trials; None: no limit.
            allocation: as for :func:`in_order`.
            share: of what the pace wishes for; the rest is somebody else's.
        """
        self.pace = pace
        self.trials = Trials(rules, budget=budget or TrialBudget())
        self.interval, self._allocation, self._share = pace.interval, allocation, share

    def due(self, step: int) -> bool:
        return self.pace.due(step)

    def ended(self, step: int) -> bool:
        return self.pace.ended(step)

    def state_dict(self) -> dict[str, Any]:
        assert self.trials is not None
        return self.trials.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert self.trials is not None
        self.trials.load_state_dict(state)

    def decide(self, view: View) -> list[Cut]:
        whole = view.whole()
        wish = 0 if whole is None else self.pace.wish(view.step, whole.total, whole.left)
        wish = math.ceil(self._share * wish)
        if whole is None or not wish:
            return []
        chosen = self._cuttable(whole, wish)
        if not chosen.units:
            return []
        if whole.losses is None:
            return _cut(whole, chosen.units, [UNTESTED] * len(chosen.units))
        return self._tested(view, whole, chosen, wish)

    def _cuttable(self, whole: WholeNeurons, wish: int) -> Choice:
        """What goes, of what can: the cut of all of it was tried on the example inputs."""
        refused: set[int] = set()
        chosen = Choice()
        for _ in range(_TRIES):
            units = [unit for unit in whole.units if unit.number not in refused]
            chosen = choose(in_order(units, whole.widths, self._allocation), whole.widths, wish)
            new = whole.cannot_go(chosen.units)
            if not new:
                return chosen
            refused |= new
        return choose((unit for unit in chosen.units if unit.number not in refused), whole.widths, wish)

    def _tested(self, view: View, whole: WholeNeurons, chosen: Choice, wish: int) -> list[Cut]:
        losses, trials, count = whole.losses, self.trials, len(chosen.units)
        assert losses is not None and trials is not None
        if not trials.budget.allows_event(view.step):
            return self._untested(view, whole, chosen, wish)
        event = trials.run(view.step, count, BySize(losses, lambda n: chosen.units[:n]), NEURONS)
        accepted = event.accepted_size or 0
        passed = math.floor(chosen.weights(accepted))
        left = max(0, whole.left - passed)
        forced = self.pace.forced(view.step, whole.total, left, max(0, wish - passed))
        if not event.usable:
            forced = 0  # a trial that says nothing is no reason to remove anything
        going = chosen.reaching(passed + forced) if forced else accepted
        trials.record(view.step, count, accepted, going - accepted, event)
        return _cut(whole, chosen.units[:going], [PASSED] * accepted + [FORCED] * (going - accepted))

    def _untested(self, view: View, whole: WholeNeurons, chosen: Choice, wish: int) -> list[Cut]:
        """No trial can be paid yet: the wish waits, except for what the pace removes all the same where the
        next event cannot be paid either."""
        assert self.trials is not None
        budget = self.trials.budget
        forced = self.pace.forced(view.step, whole.total, whole.left, wish)
        if budget.allows_event(view.step + self.interval):
            forced = 0
        going = chosen.reaching(forced) if forced else 0
        budget.wait(view.step, going)
        return _cut(whole, chosen.units[:going], [UNTESTED] * going)


def _cut(whole: WholeNeurons, units: Sequence[Unit], why: Sequence[str]) -> list[Cut]:
    cut = whole.cut(units, why) if units else None
    return [] if cut is None else [cut]
