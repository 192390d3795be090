"""What trials may cost: a share of the training's FLOPs, never of its time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORWARDS_OF_A_STEP = 3
_SPENT = {"spent": 0.0, "waited": 0, "untested": 0, "said": False}
_STATE = ("samples", "per_sample", *_SPENT)


@dataclass
class TrialBudget:
    """What trials have earned and spent.

    The unit is a step of the dense network: forward and backward, of which the forward pass of a trial is a
    third at first. All of the budget is earned evenly by the step at which the schedule ends. An event waits
    until what it may need, the model as it stands and one candidate set, is earned.

    Attributes:
        share: of the planned training that trials may cost; None: no limit.
        planned: steps of the whole training; None: not known, then a share of every step is earned with it.
        end: step by which all is earned; None: the last.
        samples: of a trial; None: not known yet.
        per_sample: what evaluating one sample costs, as last measured; None: not known yet.
        spent: so far.
        waited: events that have waited.
        untested: units that were removed since the schedule could not wait.
        said: whether it was warned of.
    """

    share: float | None = None
    planned: int | None = None
    end: int | None = None
    samples: int | None = None
    per_sample: float | None = None
    spent: float = 0.0
    waited: int = 0
    untested: int = 0
    said: bool = False

    @classmethod
    def of(
        cls,
        share: float | None,
        planned: int | None,
        end: int | None,
        samples: int | None,
        batch_size: int | None,
    ) -> TrialBudget:
        """A budget of which nothing is spent; ``batch_size`` is that of training, ``samples`` of a trial."""
        first = None if batch_size is None else 1 / (FORWARDS_OF_A_STEP * batch_size)
        return cls(share, planned, end, samples, first)

    def earned(self, step: int) -> float:
        """Steps that trials may have cost by ``step``."""
        if self.share is None:
            return math.inf
        if self.planned is None:
            return self.share * step
        return self.share * self.planned * min(1.0, step / (self.end or self.planned))

    def needed(self) -> float:
        """What an event has to have: steps; 0 while that is not known."""
        return 2 * (self.samples or 0) * (self.per_sample or 0.0)

    def allows(self, step: int, samples: int, spending: float) -> bool:
        """Whether an event that has spent this may evaluate so many samples more."""
        return self.spent + spending + samples * (self.per_sample or 0.0) <= self.earned(step) + 1e-9

    def allows_event(self, step: int) -> bool:
        """Whether an event may begin."""
        return self.spent + self.needed() <= self.earned(step) + 1e-9

    def pay(self, samples: int | None, evaluated: int, steps: float) -> None:
        """Spend what an event has cost.

        Args:
            samples: of the event; None: it evaluated none.
            evaluated: losses.
            steps: what they cost; 0: it was not counted.
        """
        if evaluated == 0:
            return
        self.samples = samples or self.samples
        if steps > 0:
            self.per_sample = steps / evaluated
        elif self.per_sample is None:
            self._say_unknown()
        self.spent += evaluated * (self.per_sample or 0.0)

    def wait(self, step: int, untested: int) -> None:
        """Note that an event waits, and that so many units go untested meanwhile.

        Warns once, where units do, or where no event will ever be allowed.
        """
        self.waited += 1
        self.untested += untested
        never = self.planned is not None and self.needed() > self.earned(self.planned)
        if self.said or not (untested or never):
            return
        self.said = True
        meanwhile = f"{untested} units go untested, since the schedule cannot wait" if untested else ""
        warnings.warn(
            f"no trial at step {step}: it may cost {self.needed():.3g} dense steps (in FLOPs), and of the "
            f"trials' budget ({self.share:.3g} of the training) {self.earned(step):.3g} are earned and "
            f"{self.spent:.3g} spent. {meanwhile or 'Nothing is tested, and nothing removed'}. A larger "
            "trial_budget or fewer samples per trial change that; the report has the counts",
            RuntimeWarning,
            stacklevel=2,
        )

    def _say_unknown(self) -> None:
        if self.share is not None and not self.said:
            self.said = True
            warnings.warn(
                f"the trials' budget ({self.share:.3g} of the training's FLOPs) is not held: what they cost "
                "could not be counted (a compiled model?), nor estimated without the setting batch_size",
                RuntimeWarning,
                stacklevel=2,
            )

    def figures(self) -> dict[str, Any]:
        """For the report: what was spent as a share of the planned training, and what came of the limit."""
        spent = self.spent / self.planned if self.planned else None
        return {"share": self.share, "spent": spent, "waited": self.waited, "untested": self.untested}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; states of earlier versions have none, and begin with nothing spent."""
        for name, value in {**_SPENT, **state}.items():
            setattr(self, name, value)
