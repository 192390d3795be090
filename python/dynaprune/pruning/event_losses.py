"""The losses of one event: the trial's, while what may go is out of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

from dynaprune.nn.calibration_mode import calibration_mode
from dynaprune.pruning.decide.trial import Losses, Trial, TrialInParts
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.trial_meter import TrialMeter

Units = TypeVar("Units")


class EventLosses(Generic[Units]):
    """``losses(units)`` of one event: the trial's, without these. All calls see the same samples.

    The first call draws the event's samples. The model stays as it is.
    """

    def __init__(
        self,
        structure: Structure,
        trial: Trial,
        suspended: Callable[[Units], AbstractContextManager[object]],
    ) -> None:
        """Evaluate ``trial`` in ``suspended(units)``, a context in which these do not work."""
        self._model, self._trial, self._suspended = structure.model, trial, suspended
        self._meter = TrialMeter(structure)
        self._drawn = False

    def __call__(self, units: Units) -> Losses:
        return self._of(units, self._trial)

    def parts(self) -> Sequence[int]:
        """Samples of each part; none where the trial evaluates all of them or nothing.

        Raises:
            TypeError, ValueError: parts that are no numbers of samples.
        """
        if not isinstance(self._trial, TrialInParts):
            return ()
        self._draw()
        found = tuple(self._trial.parts())
        if any(isinstance(each, bool) or not isinstance(each, int) for each in found):
            raise TypeError(f"expected a trial's parts as whole numbers of samples, got {found}")
        if any(each < 1 for each in found):
            raise ValueError(f"expected a trial's parts to have at least 1 sample each, got {found}")
        return found

    def cost(self) -> float:
        """What all calls together have cost, in FLOPs of a dense step; 0 where that is not counted."""
        return self._meter.steps

    def part(self, units: Units, first: int, last: int) -> Losses:
        """Losses of the parts from ``first`` up to but not including ``last``."""
        trial = self._trial
        assert isinstance(trial, TrialInParts)
        return self._of(units, lambda: trial.part(first, last))

    def _of(self, units: Units, losses: Callable[[], Losses]) -> Losses:
        self._draw()
        quiet = nullcontext() if self._trial.isolates_itself else calibration_mode(self._model)
        with self._suspended(units), quiet, self._meter.running():
            return losses()

    def _draw(self) -> None:
        if not self._drawn:
            self._trial.redraw()
            self._drawn = True
