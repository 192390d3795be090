"""What a removal has to satisfy, and what a run of trials remembers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from dynaprune.pruning.decide.setting_checks import at_least_zero, count, fraction


@dataclass(frozen=True)
class TrialRules:
    """What a removal has to satisfy.

    Args:
        threshold: probability per event, in (0, 1), of accepting a removal that harms by the tolerance
            or more.
        tolerance: of one event as a share of the present mean loss.
        absolute_tolerance: the same as a share of the scale (ln C nats); the larger of the two holds.
        allowance: rise in mean loss that all accepted removals of the run may add up to, as a share of the
            scale.
        classes: number of classes C that the scale is taken from. None: the first event's number of distinct
            labels; where the evaluation returns no labels, the first event's mean loss stands in for ln C (an
            untrained classifier's loss is ln C).
        rungs: candidate sets per event: wish, wish/2, wish/4, ...
        trial_budget: share of the planned training's FLOPs that trials may cost; an event waits until it is
            earned. None: no limit.
    """

    threshold: float = 0.01
    tolerance: float = 0.01
    absolute_tolerance: float = 0.01
    allowance: float = 0.05
    classes: int | None = None
    rungs: int = 3
    trial_budget: float | None = 0.05

    def __post_init__(self) -> None:
        fraction("threshold", self.threshold)
        for name in ("tolerance", "absolute_tolerance", "allowance"):
            at_least_zero(name, getattr(self, name))
        count("classes", self.classes, optional=True, least=2)
        count("rungs", self.rungs)
        if self.trial_budget is not None:
            fraction("trial_budget", self.trial_budget, one=True)


@dataclass
class TrialState:
    """What a run of trials remembers: the scale in nats, the allowance spent, and the costs.

    `smallest_sample` is the least n of any event: the level that n really has belongs in the report.
    `left_out` counts samples without a finite loss, `unusable` the events that had too many of them, and
    `unusable_in_a_row` those since the last usable one. `early` says whether sets may be accepted before the
    last look: None until all samples of a set were looked at, False for good once few of them bore much of
    the harm (see `looks.few_bear_the_harm`): fewer samples would miss it.
    """

    scale: float | None = None
    spent: float = 0.0
    events: int = 0
    accepted: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    smallest_sample: int | None = None
    left_out: int = 0
    unusable: int = 0
    unusable_in_a_row: int = 0
    early: bool | None = None

    def allowance_left(self, rules: TrialRules) -> float:
        """Nats of mean loss that further removals may still add; infinite before the first event."""
        if self.scale is None:
            return math.inf
        return max(0.0, rules.allowance * self.scale - self.spent)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over every figure of a `state_dict`; ValueError when the keys do not fit.

        States of earlier versions have no counts of unusable losses, and none of looks.
        """
        names = {item.name for item in fields(self)}
        if not names - _LATER <= set(state) <= names:
            raise ValueError(f"expected a trial state with the keys {sorted(names)}, got {sorted(state)}")
        for name, value in state.items():
            setattr(self, name, value)


_LATER = {"left_out", "unusable", "unusable_in_a_row", "early"}
