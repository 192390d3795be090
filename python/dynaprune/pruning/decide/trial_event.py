"""One trial event: which of a few nested candidate sets may be removed?

The event knows nothing of layers or masks. It is given the sizes of the candidate sets, largest first, and a
function that returns per-sample losses with a set suspended; it answers with the largest set whose removal
passes the paired test (`paired_test.py`), and with every figure a report needs.

`threshold` is the nominal probability, per event, of accepting a removal that raises the mean loss by the
tolerance or more. The event makes up to `len(candidates)` tests, each at `threshold / len(candidates)`
(Bonferroni), and stops at the first that passes. The level really reached is measured in `docs/trial.md`.

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

from torch import Tensor

from dynaprune.pruning.decide.significance import PairedTest, check_losses, paired_test
from dynaprune.pruning.decide.trial import Losses
from dynaprune.pruning.decide.trial_rules import TrialRules, TrialState
from dynaprune.saving.json_values import json_value


@dataclass(frozen=True)
class TrialRung:
    """The test of one candidate set. `level` is what `test.p_value` has to stay below."""

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
    `MAX_LEFT_OUT`) is not `usable`: nothing was tested.
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

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, fit for JSON (figures that are not finite become None)."""
        found: dict[str, Any] = json_value(asdict(self))
        return found


# Share of the samples that may be without a finite loss: the others are tested.
MAX_LEFT_OUT = 0.01

# Acceptance rate of a whole event of three sets, each harming by exactly the tolerance, at threshold 0.01:
# the worst of the shapes promised in docs/trial.md, by n. As printed by benchmarks/trial_level.py.
MEASURED_LEVELS = {64: 0.617, 128: 0.2134, 256: 0.0236, 512: 0.0146, 1024: 0.014}


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
) -> TrialEvent:
    """Try nested candidate sets, largest first, and charge the state for the one that passes.

    Args:
        candidates: sizes of the sets, strictly decreasing.
        evaluate: `evaluate(None)` returns the losses as the model stands, `evaluate(size)` those with the
            `size` least important units suspended (and resumed before it returns): [n] per-sample losses, or
            (losses, classes [n] or None). Every call of one event sees the same samples in the same order.
        state: carried from event to event; updated in place.
        rules: thresholds and tolerances; default `TrialRules()`.

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
    level = rules.threshold / len(sizes)
    draft = _Draft(state, rules)
    if state.allowance_left(rules) <= 0:
        return draft.finish(started, "the allowance of the run is spent")
    losses, classes = _losses_and_classes(evaluate(None))
    check_losses(losses, classes)
    draft.evaluations += 1
    finite, given = losses.detach().isfinite(), losses.numel()
    draft.left_out = given - int(finite.sum())
    if draft.left_out > MAX_LEFT_OUT * given:
        draft.usable = False
        said = f"{draft.left_out} of {given} losses of the model as it stands are not finite"
        return draft.finish(started, said)
    losses, classes = losses[finite], None if classes is None else classes[finite.to(classes.device)]
    draft.samples = losses.numel()
    draft.baseline = float(losses.detach().double().mean())
    if draft.scale is None:
        draft.scale = _scale(rules, draft.baseline, classes)
    left = max(0.0, rules.allowance * draft.scale - state.spent)
    draft.tolerance = min(max(rules.tolerance * draft.baseline, rules.absolute_tolerance * draft.scale), left)
    if draft.tolerance <= 0:
        return draft.finish(started, "the tolerance is 0: no test can show that a removal harms less")
    for size in sizes:
        before = time.perf_counter()
        removed, _ = _losses_and_classes(evaluate(size))
        check_losses(removed, None)
        if removed.numel() == given:
            removed = removed[finite.to(removed.device)]
        test = paired_test(removed, losses, draft.tolerance, classes)
        if draft.add(size, level, test, time.perf_counter() - before):
            break
    return draft.finish(started, draft.rungs[-1].reason)


@dataclass
class _Draft:
    """An event in the making. The state changes only in `finish`, so an error leaves it as it was."""

    state: TrialState
    rules: TrialRules
    rungs: list[TrialRung] = field(default_factory=list)
    evaluations: int = 0
    samples: int | None = None
    baseline: float | None = None
    tolerance: float | None = None
    accepted: int | None = None
    charged: float = 0.0
    scale: float | None = None
    left_out: int = 0
    usable: bool = True

    def __post_init__(self) -> None:
        self.scale = self.state.scale

    def add(self, size: int, level: float, test: PairedTest, seconds: float) -> bool:
        """Enter the test of a candidate set, and say whether it passed."""
        self.evaluations += 1
        accepted = test.p_value < level
        reason = test.reason or _verdict(test, level, accepted)
        self.rungs.append(TrialRung(size, level, test, accepted, reason, seconds))
        if accepted:
            self.accepted = len(self.rungs) - 1
            self.charged = max(0.0, test.mean_rise)
        return accepted

    def finish(self, started: float, reason: str) -> TrialEvent:
        state, seconds = self.state, time.perf_counter() - started
        state.scale = self.scale
        state.spent += self.charged
        state.events += 1
        state.accepted += self.accepted is not None
        state.evaluations += self.evaluations
        state.seconds += seconds
        state.left_out += self.left_out
        state.unusable += not self.usable
        state.unusable_in_a_row = 0 if self.usable else state.unusable_in_a_row + 1
        if self.samples is not None:
            state.smallest_sample = min(self.samples, state.smallest_sample or self.samples)
        return TrialEvent(
            accepted_index=self.accepted,
            accepted_size=None if self.accepted is None else self.rungs[self.accepted].size,
            rungs=tuple(self.rungs),
            samples=self.samples,
            baseline_loss=self.baseline,
            tolerance=self.tolerance,
            threshold=self.rules.threshold,
            measured_level=None if self.samples is None else measured_level(self.samples),
            charged=self.charged,
            allowance_left=state.allowance_left(self.rules),
            seconds=seconds,
            reason=reason,
            left_out=self.left_out,
            usable=self.usable,
        )


def _checked_sizes(candidates: Sequence[int]) -> list[int]:
    sizes = list(candidates)
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"expected candidate sizes as integers, got {sizes}")
    if not sizes or sizes[-1] < 1 or any(a <= b for a, b in pairwise(sizes)):
        raise ValueError(f"expected candidate sizes of at least 1, strictly decreasing, got {sizes}")
    return sizes


def _losses_and_classes(evaluation: Losses) -> tuple[Tensor, Tensor | None]:
    if isinstance(evaluation, Tensor):
        return evaluation, None
    if isinstance(evaluation, tuple) and len(evaluation) == 2:
        return evaluation
    got = type(evaluation).__name__
    raise TypeError(f"expected a trial to return losses [n] or (losses [n], classes [n] or None), got {got}")


def _scale(rules: TrialRules, baseline: float, classes: Tensor | None) -> float:
    if rules.classes is not None:
        return math.log(rules.classes)
    if classes is not None and (count := int(classes.unique().numel())) >= 2:
        return math.log(count)
    return max(0.0, baseline)


def _verdict(test: PairedTest, level: float, accepted: bool) -> str:
    comparison = f"p = {test.p_value:.2g} {'<' if accepted else '>='} {level:.2g}"
    if not accepted and test.p_mean < level:
        return f"class {test.worst_class} alone may bear the whole tolerance: {comparison}"
    return comparison
