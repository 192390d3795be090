"""What has gone so far, as one value for a user's log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Removals"]


@dataclass(frozen=True)
class Removals:
    """Counts of what went, by why it went, at the moment they were asked for.

    Attributes:
        passed, forced, untested: blocks that went, and neurons that went as units of their own.
        grown: blocks that returned.
        neurons: neurons cut.
        with_neurons: live blocks that went along with dead neurons, which changes no output.
        neurons_refused: layers of which dead neurons stay, with the reason.
        events: of the trials, as the report has them.
    """

    passed: int
    forced: int
    untested: int
    grown: int
    neurons: int
    with_neurons: int
    neurons_refused: Mapping[str, str]
    events: Sequence[Mapping[str, Any]]
