"""The built-in policy for both kinds of units: whole neurons at one event, single blocks at the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynaprune.pruning.decide.gradual import Gradual
from dynaprune.pruning.decide.gradual_neurons import GradualNeurons
from dynaprune.pruning.decide.policy import Policy, View
from dynaprune.pruning.edit.edits import Cut, Grow, Release


class ByTurns(Policy):
    """Asks two policies in turn, whole neurons first. One allowance holds for the trials of both."""

    def __init__(self, neurons: GradualNeurons, blocks: Gradual) -> None:
        self._neurons, self._blocks = neurons, blocks
        self.interval, self.grows = blocks.interval, blocks.grows
        self.trials = neurons.trials = blocks.trials
        self._events = 0

    def due(self, step: int) -> bool:
        return self._blocks.due(step)

    def ended(self, step: int) -> bool:
        return self._blocks.ended(step)

    def decide(self, view: View) -> list[Release | Grow | Cut]:
        self._events += 1
        return [*(self._neurons.decide(view) if self._events % 2 else self._blocks.decide(view))]

    def state_dict(self) -> dict[str, Any]:
        return {**self._blocks.state_dict(), "events_done": self._events}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._blocks.load_state_dict(state)
        self._events = int(state["events_done"])
