"""The built-in policy: remove as a pace wishes, what passes the trial first, and let some blocks return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynaprune.pruning.decide.allocation import Selection, select
from dynaprune.pruning.decide.by_size import BySize
from dynaprune.pruning.decide.growth import growth_fraction, select_growth
from dynaprune.pruning.decide.neuron_order import whole_neurons_first
from dynaprune.pruning.decide.pace import PaceWithInterval
from dynaprune.pruning.decide.policy import LayerView, Policy, View
from dynaprune.pruning.decide.trial_budget import TrialBudget
from dynaprune.pruning.decide.trial_rules import TrialRules
from dynaprune.pruning.decide.trials import Trials
from dynaprune.pruning.edit.edits import FORCED, PASSED, UNTESTED, Grow, Release

Masks = dict[str, Tensor]


class Gradual(Policy):
    """Removes what the pace wishes for, if it passes the trial; the pace says what goes all the same.

    With a cubic pace this is gradual pruning with the trial as brake, with a self-paced one the trial alone
    decides. Without a trial everything goes untested.
    """

    def __init__(
        self,
        pace: PaceWithInterval,
        rules: TrialRules,
        budget: TrialBudget | None = None,
        *,
        allocation: str = "global",
        per_flop: bool = False,
        whole_neurons: bool = False,
        regrow: float = 0.0,
        regrow_until: int = 1,
    ) -> None:
        """Decide by these settings.

        Args:
            budget: of the trials; None: no limit.
            allocation: how removals spread over layers, see :func:`select`.
            per_flop: rank by score per FLOP saved.
            whole_neurons: try whole neurons before single blocks.
            regrow: fraction of an event's removed blocks that may return, cosine-annealed to 0 at step
                ``regrow_until``.
        """
        self.pace = pace
        self.trials = Trials(rules, budget=budget or TrialBudget())
        self.interval, self.grows = pace.interval, regrow > 0
        self._allocation, self._per_flop, self._whole_neurons = allocation, per_flop, whole_neurons
        self._regrow, self._regrow_until = regrow, regrow_until

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

    def decide(self, view: View) -> list[Release | Grow]:
        wish = self.pace.wish(view.step, view.units, view.live_units)
        growing = min(round(self._growth_share(view) * wish), _growable(view))
        asked = min(wish + growing, view.live_units)
        if asked == 0:
            return []
        releases, removed = self._removals(view, asked)
        growth = self._growth(view, min(growing, removed), releases)
        return [*releases, *growth]

    def _removals(self, view: View, wish: int) -> tuple[list[Release], int]:
        """What goes, of ``wish`` units, and how many that is."""
        live = {name: layer.mask for name, layer in view.layers.items()}
        selection = self._selection(view, wish, live, whole_neurons=self._whole_neurons)
        found = len(selection)
        if found == 0:
            return [], 0
        if view.losses is None:
            return [Release(selection.first(found), UNTESTED)], found
        losses, trials = view.losses, self.trials
        assert trials is not None
        if not trials.budget.allows_event(view.step):
            return self._untested(view, trials, wish, live)
        event = trials.run(view.step, found, BySize(losses, lambda n: selection.first(n) if n else {}))
        accepted, releases = event.accepted_size or 0, []
        if accepted:
            passed = selection.first(accepted)
            releases.append(Release(passed, PASSED))
            live = {name: mask & ~passed[name] for name, mask in live.items()}
        still = max(0, view.live_units - accepted)
        forced = min(self.pace.forced(view.step, view.units, still, wish - accepted), found - accepted)
        if not event.usable:
            forced = 0  # a trial that says nothing is no reason to remove anything
        if forced > 0:
            remaining = self._selection(view, forced, live)
            forced = len(remaining)
            releases.append(Release(remaining.first(forced), FORCED))
        trials.record(view.step, wish, accepted, forced, event)
        return releases, accepted + forced

    def _untested(
        self, view: View, trials: Trials, wish: int, live: Mapping[str, Tensor]
    ) -> tuple[list[Release], int]:
        """No trial can be paid yet: the wish waits, except for what the pace removes all the same where the
        next event cannot be paid either."""
        forced = min(self.pace.forced(view.step, view.units, view.live_units, wish), wish)
        if trials.budget.allows_event(view.step + self.interval):
            forced = 0
        selection = self._selection(view, forced, live)
        trials.budget.wait(view.step, len(selection))
        return ([Release(selection.first(forced), UNTESTED)] if len(selection) else []), len(selection)

    def _selection(
        self, view: View, count: int, live: Mapping[str, Tensor], *, whole_neurons: bool = False
    ) -> Selection:
        """The next ``count`` blocks to go; with ``whole_neurons`` those of whole neurons first."""
        layers = view.layers
        scores = {name: layer.scores(live[name]) for name, layer in layers.items()}
        selection = select(
            scores,
            live,
            count,
            allocation=self._allocation,
            floors={name: layer.floor_share for name, layer in layers.items()},
            original={name: layer.original for name, layer in layers.items()},
            cost={name: layer.flops_per_block for name, layer in layers.items()} if self._per_flop else None,
            protected={name: layer.protected & live[name] for name, layer in layers.items()},
        )
        figures = view.neurons() if whole_neurons else None
        if figures is None:
            return selection
        may_go = {name: mask & ~layers[name].protected for name, mask in live.items()}
        removable = {name: max(0, int(mask.sum()) - layers[name].floor) for name, mask in live.items()}
        return whole_neurons_first(figures, selection, scores, may_go, removable)

    def _growth_share(self, view: View) -> float:
        if not self.grows or all(layer.probe is None for layer in view.layers.values()):
            return 0.0
        return growth_fraction(view.step, self._regrow_until, self._regrow)

    def _growth(self, view: View, count: int, releases: list[Release]) -> list[Grow]:
        """Up to ``count`` dead blocks that return where the dense gradient is largest."""
        probed = {name: layer for name, layer in view.layers.items() if layer.probe is not None}
        if count < 1 or not probed:
            return []
        live = {
            name: _after(layer, [each.masks[name] for each in releases]) for name, layer in probed.items()
        }
        norms = {name: layer.probe for name, layer in probed.items() if layer.probe is not None}
        eligible = {name: ~live[name] & (norm > 0) for name, norm in norms.items()}
        left = {name: layer.capacity - int(live[name].sum()) for name, layer in probed.items()}
        chosen = select_growth(norms, eligible, count, left)
        return [Grow(chosen, protected_until=view.step + self.interval + 1)]


def _after(layer: LayerView, gone: list[Tensor]) -> Tensor:
    live = layer.mask
    for blocks in gone:
        live = live & ~blocks
    return live


def _growable(view: View) -> int:
    """Dead blocks that the probe found a gradient at."""
    norms = [layer.probe for layer in view.layers.values() if layer.probe is not None]
    return sum(int((torch.isfinite(norm) & (norm > 0)).sum()) for norm in norms)


def regrowth_end(end: float, total_steps: int | None) -> int:
    """The step from which nothing returns: ``end`` as a fraction of training."""
    return 1 if total_steps is None else max(1, math.floor(end * total_steps))
