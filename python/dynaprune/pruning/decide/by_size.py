"""Losses of candidate sets by their size, as an event asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dynaprune.pruning.decide.trial import Losses


class BySize:
    """``losses(units(size))``, and part of it where ``losses`` has parts (see ``run_event``)."""

    def __init__(self, losses: Callable[[Any], Losses], units: Callable[[int], Any]) -> None:
        """Ask ``losses`` for what is left without ``units(size)``; size 0: the model as it stands."""
        self._losses: Any = losses
        self._units = units

    def __call__(self, size: int | None) -> Losses:
        found: Losses = self._losses(self._units(size or 0))
        return found

    def cost(self) -> float:
        """What it has cost so far (see ``TrialBudget``); 0 where that is not counted."""
        cost = getattr(self._losses, "cost", None)
        return float(cost()) if callable(cost) else 0.0

    def parts(self) -> Sequence[int]:
        parts = getattr(self._losses, "parts", None)
        return tuple(parts()) if callable(parts) else ()

    def part(self, size: int | None, first: int, last: int) -> Losses:
        found: Losses = self._losses.part(self._units(size or 0), first, last)
        return found
