"""What evaluations of a trial cost, counted in FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.observe.tokens import TokenCounter


class TrialMeter:
    """Adds up the FLOPs of forward passes: two per live weight and token of linear layers and convolutions.

    The unit is the FLOPs of these layers in a step of training before anything went, so what is not counted
    (attention, norms) is left out on both sides.

    Attributes:
        steps: so far; stays 0 where nothing can be counted.
    """

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self.steps = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what the model does inside."""
        structure = self._structure
        counter = TokenCounter(structure.model, of_trials=True)
        try:
            yield
        finally:
            counter.stop()
        if structure.step_flops:
            weights = structure.weights_of(counter.tokens, first=False)
            flops = sum(2.0 * weights[name] * tokens for name, tokens in counter.tokens.items())
            self.steps += flops / structure.step_flops
