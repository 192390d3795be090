"""What the trials of an arm cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from dynaprune.experiment.metrics import flops_of

__all__ = ["CountedTrial"]


class CountedTrial:
    """A trial that counts its calls, FLOPs and seconds; everything else is the wrapped trial's.

    Of None, no trial, nothing is ever counted."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial
        self.calls = 0
        self.flops = 0.0
        self.seconds = 0.0

    def __call__(self) -> Any:
        return self._counted(self._trial)

    def part(self, first: int, last: int) -> Any:
        """Losses of some parts of the samples; a call of its own."""
        return self._counted(lambda: self._trial.part(first, last))

    def _counted(self, evaluate: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        losses, flops = flops_of(evaluate)
        self.calls += 1
        self.flops += flops
        self.seconds += time.perf_counter() - started
        return losses

    def costs(self) -> dict[str, float]:
        """What was counted so far."""
        return {"calls": self.calls, "flops": self.flops, "seconds": self.seconds}

    def resume(self, costs: Mapping[str, float]) -> None:
        """Go on counting from `costs`."""
        self.calls, self.flops, self.seconds = int(costs["calls"]), costs["flops"], costs["seconds"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_trial"], name)
