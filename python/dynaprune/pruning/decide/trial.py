"""Where a trial's losses come from: a protocol, and any callable that returns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Losses = Tensor | tuple[Tensor, Tensor | None]
"""Per-sample losses ``[n]``, or these and the samples' classes ``[n]`` (None: no check by class)."""


@runtime_checkable
class Trial(Protocol):
    """Per-sample losses of the model as it stands, on data that training does not use for its scores.

    Attributes:
        samples: losses that one call returns, for the default interval between events; None: not known.
        isolates_itself: a call already runs in ``calibration_mode``; otherwise the pruner sees to it.
    """

    samples: int | None
    isolates_itself: bool

    def __call__(self) -> Losses:
        """The losses; the same samples in the same order until the next :meth:`redraw`."""

    def redraw(self) -> None:
        """Draw the samples of the next event."""

    def state_dict(self) -> Mapping[str, Any] | None:
        """What a resumed run needs to draw what this one would have drawn."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the sampling of a saved run."""


@runtime_checkable
class TrialInParts(Trial, Protocol):
    """A trial that can evaluate some of its samples by themselves: tests then end early where they can."""

    def parts(self) -> Sequence[int]:
        """Samples of each part, as last drawn; none where it evaluates all of them or nothing."""

    def part(self, first: int, last: int) -> Losses:
        """Losses of the parts from ``first`` up to but not including ``last``, in the order of a call."""


class FunctionTrial:
    """A trial made of any callable: what it has of :class:`Trial` is used, the rest has defaults."""

    def __init__(self, losses: Callable[[], Losses]) -> None:
        self._losses = losses
        samples = getattr(losses, "samples", None)
        self.samples: int | None = samples if isinstance(samples, int) else None
        self.isolates_itself = bool(getattr(losses, "isolates_itself", False))

    def __call__(self) -> Losses:
        return self._losses()

    def parts(self) -> Sequence[int]:
        parts = getattr(self._losses, "parts", None)
        return parts() if callable(parts) else ()

    def part(self, first: int, last: int) -> Losses:
        part: Any = getattr(self._losses, "part", None)
        if not callable(part):
            raise TypeError("expected a trial with parts() to have part(first, last), got none")
        found: Losses = part(first, last)
        return found

    def redraw(self) -> None:
        if callable(redraw := getattr(self._losses, "redraw", None)):
            redraw()

    def state_dict(self) -> Mapping[str, Any] | None:
        if callable(state_dict := getattr(self._losses, "state_dict", None)):
            state: Mapping[str, Any] = state_dict()
            return state
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the sampling of a saved run; ValueError where the callable cannot."""
        load = getattr(self._losses, "load_state_dict", None)
        if not callable(load):
            raise ValueError("expected a trial that can continue the saved one (load_state_dict), got none")
        load(state)


def as_trial(given: Trial | Callable[[], Losses] | None) -> Trial | None:
    """``given`` as a :class:`Trial`; TypeError for what cannot be called."""
    if given is None or isinstance(given, Trial):
        return given
    if not callable(given):
        raise TypeError(
            f"expected the trial as a callable that returns per-sample losses, got {type(given).__name__}"
        )
    return FunctionTrial(given)
