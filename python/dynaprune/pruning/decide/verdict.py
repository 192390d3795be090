"""What a look at a trial's losses says: passed, failed, or go on."""

from __future__ import annotations

from typing import NamedTuple

from dynaprune.pruning.decide.looks import FUTILE, Look, predictive_power
from dynaprune.pruning.decide.significance import PairedTest


class Verdict(NamedTuple):
    """How a test ends; `level` is what the p-value had to stay below."""

    accepted: bool
    level: float
    reason: str


def verdict_at(test: PairedTest, look: Look, last: Look) -> Verdict | None:
    """How the test ends at this look; None where it goes on."""
    if test.reason:
        return Verdict(False, last.level, test.reason)
    accepted = test.p_value < look.level
    if look is last or accepted:
        return Verdict(accepted, look.level, _comparison(test, look.level, accepted))
    power = float(predictive_power(test.p_value, look.samples / last.samples, last.level))
    if power >= FUTILE:
        return None
    said = f"p = {test.p_value:.2g} at {look.samples} of {last.samples} samples"
    return Verdict(False, last.level, f"{said}: it passes with a probability of {power:.2g} only")


def _comparison(test: PairedTest, level: float, accepted: bool) -> str:
    comparison = f"p = {test.p_value:.2g} {'<' if accepted else '>='} {level:.2g}"
    if not accepted and test.p_mean < level:
        return f"class {test.worst_class} alone may bear the whole tolerance: {comparison}"
    return comparison
