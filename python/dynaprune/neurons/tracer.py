"""Keeps the groups of a model's neurons up to date, from an example or from batches of the training."""

from __future__ import annotations

import warnings

from torch import nn

from dynaprune.neurons.example_inputs import ExampleInputs, InputCapture
from dynaprune.neurons.groups import NeuronMap, find_groups

_WHOLE_MODEL = "the whole model"
_NO_INPUTS = (
    "no training batch was seen (the model runs compiled, or not in training mode): give attach its "
    "example_inputs"
)


class NeuronTracer:
    """Traces one model when its groups are asked for, and again only after they have changed.

    Attributes:
        refused: layers of which dead neurons stay, with the reason.
        current: the groups that were traced last; None before, and after a change.
    """

    def __init__(self, model: nn.Module, example: ExampleInputs | None, *, plain: bool = False) -> None:
        """Trace with ``example``, or with training batches that are captured where it is None.

        Args:
            plain: also find the groups that plain layers alone make and read.
        """
        self._model, self._example, self._plain = model, example, plain
        self._capture = InputCapture(model)
        self._unseen = 0
        self.refused: dict[str, str] = {}
        self.current: NeuronMap | None = None

    def arm(self) -> None:
        """Capture the next training batch where there is no example."""
        if self._example is None:
            self._capture.arm()

    def disarm(self) -> None:
        """Let go of what was captured."""
        self._capture.remove()

    @property
    def example(self) -> ExampleInputs | None:
        """What the model takes: as it was given, or the last training batch that was captured."""
        return self._example or self._capture.example

    def groups(self) -> NeuronMap | None:
        """The groups of the model as it is now; None where it cannot be traced: a warning says why."""
        if self.example is None or self.refused.get(_WHOLE_MODEL, _NO_INPUTS) != _NO_INPUTS:
            return None
        if self.current is not None and not self.current.fits(self._model):
            self.current = None
        if self.current is None:
            try:
                self.current = find_groups(self._model, self.example, plain=self._plain)
            except Exception as error:
                reason = f"the model cannot be traced: {type(error).__name__}: {error}"
                self.refused[_WHOLE_MODEL] = reason
                warnings.warn(f"dead neurons stay in the network: {reason}", RuntimeWarning, stacklevel=2)
        return self.current

    def forget(self) -> None:
        """The structure has changed: trace anew when asked."""
        self.current = None

    def say_unseen(self) -> None:
        """Warn at the second event without a batch to trace with: at the first step there is none."""
        self.refused[_WHOLE_MODEL] = _NO_INPUTS
        self._unseen += 1
        if self._unseen == 2:
            warnings.warn(f"dead neurons stay in the network: {_NO_INPUTS}", RuntimeWarning, stacklevel=2)
