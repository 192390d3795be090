"""One trial event: which of a few nested candidate sets may be removed?

The event knows nothing of layers or masks. It is given the sizes of the candidate sets, largest first, and a
function that returns per-sample losses with a set suspended; it answers with the largest set whose removal
passes the paired test (`significance.py`), and with every figure a report needs.

`threshold` is the nominal probability, per event, of accepting a removal that raises the mean loss by the
tolerance or more. The event makes up to `len(candidates)` tests, each at `threshold / len(candidates)`
(Bonferroni), and stops at the first that passes. A trial that can evaluate its samples in parts is looked at
up to three times per test (`looks.py`), and ends early where a set clearly passes or has no hope left. The
level really reached is measured in `docs/trial.md`.

Two limits hold the harm of what is accepted:

- the tolerance of one event, `max(relative * loss, absolute * scale)`, with `scale = ln C` nats for C
  classes;
- one allowance over the whole run, `allowance * scale`, that never resets: an accepted removal is charged the
  rise it showed, a fall is not credited, and the tolerance of an event is never more than what is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dynaprune.pruning.decide.event_samples import EventSamples
from dynaprune.pruning.decide.looks import few_bear_the_harm, plan_looks
from dynaprune.pruning.decide.significance import PairedTest, paired_test
from dynaprune.pruning.decide.trial import Losses
from dynaprune.pruning.decide.trial_rules import TrialRules, TrialState
from dynaprune.pruning.decide.verdict import Verdict, verdict_at
from dynaprune.saving.json_values import json_value


@dataclass(frozen=True)
class TrialRung:
    """The test of one candidate set, at the look that ended it. `level` is what `test.p_value` has to stay
    below, there if the set was accepted, and else at the last look."""

    size: int
    level: float
    test: PairedTest
    accepted: bool
    reason: str
    seconds: float


@dataclass(frozen=True)
class TrialEvent:
    """Outcome of one event. Losses and tolerances in nats, times in seconds.

    `accepted_index` and `accepted_size` are None when nothing passed; then nothing may be removed by trial.
    `baseline_loss` and `tolerance` are None when the event ended before they were known; `reason` says why it
    ended. `left_out` samples had no finite loss as the model stands. An event with too many of them (see
    `MAX_LEFT_OUT`) is not `usable`: nothing was tested. `evaluated` counts losses, of all sets together.
    """

    accepted_index: int | None
    accepted_size: int | None
    rungs: tuple[TrialRung, ...]
    samples: int | None
    baseline_loss: float | None
    tolerance: float | None
    threshold: float
    measured_level: float | None
    charged: float
    allowance_left: float
    seconds: float
    reason: str
    left_out: int
    usable: bool
    evaluated: int

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, fit for JSON (figures that are not finite become None)."""
        found: dict[str, Any] = json_value(asdict(self))
        return found


# Share of the samples that may be without a finite loss: the others are tested.
MAX_LEFT_OUT = 0.01

# Acceptance rate of a whole event of three sets, each harming by exactly the tolerance, at threshold 0.01:
# the worst of the shapes promised in docs/trial.md, by n. As printed by benchmarks/trial_level.py.
MEASURED_LEVELS = {64: 0.6224, 128: 0.2128, 256: 0.022, 512: 0.0136, 1024: 0.0148}


def measured_level(samples: int) -> float | None:
    """Level at threshold 0.01 measured for the largest tabled n up to `samples`; None below the table."""
    tabled = [n for n in MEASURED_LEVELS if n <= samples]
    return MEASURED_LEVELS[max(tabled)] if tabled else None


def candidate_sizes(wish: int, rungs: int = 3) -> list[int]:
    """Sizes to try, largest first: wish, wish/2, wish/4, ..., each at least 1 and named once."""
    if wish < 1 or rungs < 1:
        raise ValueError(f"expected a wish and a number of rungs of at least 1, got {wish} and {rungs}")
    return sorted({max(1, wish >> k) for k in range(rungs)}, reverse=True)


def minimum_interval(samples: int, batch_size: int, rungs: int = 3, share: float = 0.05) -> int:
    """Steps that must lie between two events so that trials cost at most `share` of training.

    An event runs 1 + rungs forward passes over `samples`; a training step costs about three forward passes
    over `batch_size` (forward, dgrad, wgrad): `(1 + rungs) * samples / (share * 3 * batch_size)`, rounded up.
    """
    if min(samples, batch_size, rungs) < 1 or not 0 < share <= 1:
        raise ValueError(
            "expected samples, batch_size and rungs of at least 1 and a share in (0, 1], "
            f"got {samples}, {batch_size}, {rungs} and {share}"
        )
    return max(1, math.ceil((1 + rungs) * samples / (share * 3 * batch_size)))


def run_event(
    candidates: Sequence[int],
    evaluate: Callable[[int | None], Losses],
    state: TrialState,
    rules: TrialRules | None = None,
    allows: Callable[[int], bool] = lambda samples: True,
) -> TrialEvent:
    """Try nested candidate sets, largest first, and charge the state for the one that passes.

    Args:
        candidates: sizes of the sets, strictly decreasing.
        evaluate: `evaluate(None)` returns the losses as the model stands, `evaluate(size)` those with the
            `size` least important units suspended (and resumed before it returns): [n] per-sample losses, or
            (losses, classes [n] or None). Every call of one event sees the same samples in the same order.
            Where it has `parts()`, the samples of each part, `evaluate.part(size, first, last)` returns the
            losses of the parts from `first` up to but not including `last`.
        state: carried from event to event; updated in place.
        rules: thresholds and tolerances; default `TrialRules()`.
        allows: `allows(samples)`, whether so many samples more may be evaluated: asked before every candidate
            set but the first.

    Returns:
        The event. Samples without a finite loss as the model stands are left out, up to `MAX_LEFT_OUT` of
        them; more end the event. A loss that is not finite without the candidates alone rejects.

    Raises:
        TypeError, ValueError: for candidates that are not decreasing sizes, and for losses or classes of a
            wrong type or shape. Whatever `evaluate` raises passes through; the state is then as it was.
    """
    rules = TrialRules() if rules is None else rules
    sizes = _checked_sizes(candidates)
    started = time.perf_counter()
    draft = _Draft(state, rules)
    if state.allowance_left(rules) <= 0:
        return draft.finish(started, "the allowance of the run is spent")
    draft.samples = samples = EventSamples(evaluate)
    if state.scale is None and rules.classes is None:
        samples.extend(None)  # the scale is taken from all of them
    for size in sizes:
        if draft.rungs and not allows(samples.total + samples.unknown):
            return draft.finish(started, f"{draft.rungs[-1].reason}; the budget allows no further set")
        if said := draft.test(size, rules.threshold / len(sizes)):
            return draft.finish(started, said)
        if draft.accepted is not None:
            break
    return draft.finish(started, draft.rungs[-1].reason)


@dataclass
class _Draft:
    """An event in the making. The state changes only in `finish`, so an error leaves it as it was.

    `early` says whether sets may be accepted before the last look (see `TrialState`).
    """

    state: TrialState
    rules: TrialRules
    rungs: list[TrialRung] = field(default_factory=list)
    samples: EventSamples | None = None
    baseline: float | None = None
    tolerance: float | None = None
    accepted: int | None = None
    charged: float = 0.0
    scale: float | None = None
    usable: bool = True
    early: bool | None = None

    def __post_init__(self) -> None:
        self.scale, self.early = self.state.scale, self.state.early

    def test(self, size: int, level: float) -> str:
        """Test a candidate set; the answer is why the event ends, empty where it goes on."""
        samples, started = self.samples, time.perf_counter()
        assert samples is not None
        if not samples.parts:
            samples.extend(None)
        looks = plan_looks(samples.parts, level, early=self.early is True)
        without: list[Tensor] = []
        verdict: Verdict | None = None
        for look in looks:
            if said := self._know(samples, look.last):
                return said
            assert self.tolerance is not None
            without.append(samples.without(size, look.first, look.last))
            losses, classes = samples.first(look.last)
            removed = torch.cat(without)
            test = paired_test(removed, losses, self.tolerance, classes)
            self._note(look is looks[-1], removed, losses, test)
            verdict = verdict_at(test, look, looks[-1])
            if verdict is not None:
                break
        assert verdict is not None, "the last look always has a verdict"
        self._add(size, verdict, test, time.perf_counter() - started)
        return ""

    def _know(self, samples: EventSamples, last: int) -> str:
        """Know the losses as the model stands, of the parts before ``last``, and the tolerance from them."""
        samples.extend(last)
        given = samples.total
        if samples.left_out > MAX_LEFT_OUT * given:
            self.usable = False
            return f"{samples.left_out} of {given} losses of the model as it stands are not finite"
        self.baseline = float(samples.within.detach().double().mean())
        if self.scale is None:
            self.scale = _scale(self.rules, self.baseline, samples.classes)
        rules, left = self.rules, max(0.0, self.rules.allowance * self.scale - self.state.spent)
        wanted = max(rules.tolerance * self.baseline, rules.absolute_tolerance * self.scale)
        self.tolerance = min(wanted, left)
        return "" if self.tolerance > 0 else "the tolerance is 0: no test can show that a removal harms less"

    def _note(self, last: bool, removed: Tensor, losses: Tensor, test: PairedTest) -> None:
        """Whether harm falls on few samples decides whether fewer than all of them may accept."""
        if test.reason or self.early is False:
            return
        rise = removed.detach().to("cpu", torch.float64) - losses.detach().to("cpu", torch.float64)
        if bool(few_bear_the_harm(rise, self.tolerance or 0.0)):
            self.early = False
        elif last:
            self.early = True

    def _add(self, size: int, verdict: Verdict, test: PairedTest, seconds: float) -> None:
        self.rungs.append(TrialRung(size, verdict.level, test, verdict.accepted, verdict.reason, seconds))
        if verdict.accepted:
            self.accepted = len(self.rungs) - 1
            self.charged = max(0.0, test.mean_rise)

    def finish(self, started: float, reason: str) -> TrialEvent:
        state, seconds = self.state, time.perf_counter() - started
        done = self.samples or EventSamples(lambda size: torch.empty(0))
        known = done.total - done.left_out if self.usable and done.total else None
        state.scale, state.early = self.scale, self.early
        state.spent += self.charged
        state.events += 1
        state.accepted += self.accepted is not None
        state.evaluations += done.evaluations
        state.seconds += seconds
        state.left_out += done.left_out
        state.unusable += not self.usable
        state.unusable_in_a_row = 0 if self.usable else state.unusable_in_a_row + 1
        if known is not None:
            state.smallest_sample = min(known, state.smallest_sample or known)
        return TrialEvent(
            accepted_index=self.accepted,
            accepted_size=None if self.accepted is None else self.rungs[self.accepted].size,
            rungs=tuple(self.rungs),
            samples=known,
            baseline_loss=self.baseline,
            tolerance=self.tolerance,
            threshold=self.rules.threshold,
            measured_level=None if known is None else measured_level(known),
            charged=self.charged,
            allowance_left=state.allowance_left(self.rules),
            seconds=seconds,
            reason=reason,
            left_out=done.left_out,
            usable=self.usable,
            evaluated=done.evaluated,
        )


def _checked_sizes(candidates: Sequence[int]) -> list[int]:
    sizes = list(candidates)
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"expected candidate sizes as integers, got {sizes}")
    if not sizes or sizes[-1] < 1 or any(a <= b for a, b in pairwise(sizes)):
        raise ValueError(f"expected candidate sizes of at least 1, strictly decreasing, got {sizes}")
    return sizes


def _scale(rules: TrialRules, baseline: float, classes: Tensor | None) -> float:
    if rules.classes is not None:
        return math.log(rules.classes)
    if classes is not None and (count := int(classes.unique().numel())) >= 2:
        return math.log(count)
    return max(0.0, baseline)
