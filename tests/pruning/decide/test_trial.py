import dataclasses
import itertools
import json
import math

import pytest
import torch

from dynaprune.pruning.decide.trial_event import (
    MEASURED_LEVELS,
    candidate_sizes,
    measured_level,
    minimum_interval,
    run_event,
)
from dynaprune.pruning.decide.trial_rules import TrialRules, TrialState

N = 256


class Model:
    """Stands for a model under trial: `harm[size]` is the rise of the mean loss, `noise` its standard
    deviation."""

    def __init__(self, harm, loss=1.0, noise=0.01, classes=10, n=N, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.harm, self.calls = harm, []
        self.losses = loss * torch.rand(n, generator=generator, dtype=torch.float64) * 2
        self.classes = None if classes is None else torch.arange(n) % classes
        self.noise = {size: noise * torch.randn(n, generator=generator, dtype=torch.float64) for size in harm}
        self.noise = {size: noise - noise.mean() for size, noise in self.noise.items()}

    def __call__(self, size):
        self.calls.append(size)
        if size is None:
            return self.losses, self.classes
        return self.losses + self.harm[size] + self.noise[size], self.classes


def test_the_largest_set_that_passes_is_taken_and_the_rest_not_tried():
    model, state = Model({40: 0.5, 20: 0.005, 10: 0.0}), TrialState()
    event = run_event([40, 20, 10], model, state)
    assert model.calls == [None, 40, 20]
    assert (event.accepted_index, event.accepted_size) == (1, 20)
    assert [rung.accepted for rung in event.rungs] == [False, True]
    assert [rung.size for rung in event.rungs] == [40, 20]
    assert all(rung.level == pytest.approx(0.01 / 3) for rung in event.rungs)
    assert event.rungs[0].test.p_value > 0.99
    assert event.rungs[1].test.p_value < event.rungs[1].level
    assert event.rungs[1].test.mean_rise == pytest.approx(0.005)
    assert event.charged == pytest.approx(0.005)
    assert state.spent == pytest.approx(0.005)
    assert (state.events, state.accepted, state.evaluations, state.smallest_sample) == (1, 1, 3, N)
    assert event.samples == N
    assert event.baseline_loss == pytest.approx(float(model.losses.mean()))
    assert event.seconds >= sum(rung.seconds for rung in event.rungs) > 0


def test_nothing_passes():
    model, state = Model({4: 0.5, 2: 0.5, 1: 0.5}), TrialState()
    event = run_event([4, 2, 1], model, state)
    assert event.accepted_index is None and event.accepted_size is None
    assert len(event.rungs) == 3
    assert event.charged == state.spent == 0.0
    assert state.accepted == 0 and state.events == 1


def test_harm_at_the_tolerance_and_above_is_rejected_and_below_accepted():
    tolerance = run_event([1], Model({1: 0.0}), TrialState()).tolerance
    for share, passes in ((0.5, True), (0.8, True), (1.0, False), (1.2, False)):
        event = run_event([1], Model({1: share * tolerance}), TrialState())
        assert (event.accepted_index == 0) is passes, share


def test_tolerance_is_relative_to_the_loss_or_absolute_in_ln_classes():
    high = run_event([1], Model({1: 0.0}, loss=5.0), TrialState())
    assert high.tolerance == pytest.approx(0.01 * high.baseline_loss)
    low = run_event([1], Model({1: 0.0}, loss=0.01), TrialState())
    assert low.tolerance == pytest.approx(0.01 * math.log(10))
    named = run_event([1], Model({1: 0.0}, loss=0.01), TrialState(), TrialRules(classes=100))
    assert named.tolerance == pytest.approx(0.01 * math.log(100))
    state = TrialState()
    unlabelled = run_event([1], Model({1: 0.0}, loss=3.0, classes=None), state)
    assert state.scale == pytest.approx(unlabelled.baseline_loss)
    run_event([1], Model({1: 0.0}, loss=0.01, classes=None), state)
    assert state.scale == pytest.approx(unlabelled.baseline_loss)


def test_the_allowance_of_the_run_is_spent_once_and_never_resets():
    state, rules = TrialState(), TrialRules()
    total = 0.05 * math.log(10)
    events = [run_event([1], Model({1: 0.01}, seed=seed), state, rules) for seed in range(40)]
    accepted = [event for event in events if event.accepted_index is not None]
    assert 5 <= len(accepted) < 40
    assert state.spent == pytest.approx(sum(event.charged for event in accepted)) and state.spent <= total
    lefts = [event.allowance_left for event in events]
    assert all(later <= earlier for earlier, later in itertools.pairwise(lefts))
    assert all(event.tolerance <= before + 1e-12 for event, before in zip(events[1:], lefts, strict=False))
    assert events[-1].accepted_index is None


def test_a_spent_allowance_ends_the_event_before_any_evaluation():
    state = TrialState(scale=1.0, spent=0.05)
    model = Model({1: 0.0})
    event = run_event([1], model, state)
    assert model.calls == []
    assert event.reason == "the allowance of the run is spent"
    assert event.accepted_index is None and event.tolerance is None


def test_a_fall_is_not_credited():
    state = TrialState()
    event = run_event([1], Model({1: -0.5}), state)
    assert event.accepted_index == 0
    assert event.charged == state.spent == 0.0


def test_a_class_that_bears_the_whole_tolerance_stops_the_removal():
    model = Model({1: 0.0})
    hurt = torch.where(model.classes == 3, 0.3, -0.06)
    event = run_event(
        [1], lambda size: (model(size)[0] + (0 if size is None else hurt), model.classes), TrialState()
    )
    assert event.accepted_index is None
    assert event.rungs[0].test.worst_class == 3
    assert event.rungs[0].reason.startswith("class 3 alone may bear the whole tolerance")
    blind = run_event([1], lambda size: model(size)[0] + (0 if size is None else hurt), TrialState())
    assert blind.accepted_index == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_reject_with_a_reason(value):
    state = TrialState()
    broken = torch.full((N,), value)
    event = run_event([2, 1], lambda size: broken, state)
    assert event.accepted_index is None and event.rungs == ()
    assert event.reason == f"{N} of {N} losses of the model as it stands are not finite"
    assert not event.usable and state.unusable == state.unusable_in_a_row == 1
    assert state.scale is None and state.events == 1
    model = Model({2: 0.0, 1: 0.0})
    event = run_event([2, 1], lambda size: broken if size == 2 else model(size)[0], state)
    assert event.accepted_size == 1
    assert event.rungs[0].reason == f"{N} of {N} losses without the candidates are not finite"
    json.dumps(event.as_dict(), allow_nan=False)


def test_planted_useless_units_are_found_among_harmful_ones():
    """100 events each: a removal of no effect passes in at least 90, one at twice the tolerance in none."""
    found = harmed = 0
    for seed in range(100):
        noise = {"noise": 0.06, "n": 1024, "seed": seed}
        found += run_event([8], Model({8: 0.0}, **noise), TrialState()).accepted_index is not None
        harmed += run_event([8], Model({8: 0.046}, **noise), TrialState()).accepted_index is not None
    assert found >= 90
    assert harmed == 0


def test_state_survives_a_checkpoint():
    state, model = TrialState(), Model({1: 0.01})
    run_event([1], model, state)
    saved = json.loads(json.dumps(state.state_dict()))
    resumed = TrialState()
    resumed.load_state_dict(saved)
    assert resumed == state
    first, second = (run_event([1], model, s) for s in (state, resumed))
    assert first.tolerance == second.tolerance and first.allowance_left == second.allowance_left
    with pytest.raises(ValueError, match="trial state with the keys"):
        resumed.load_state_dict({"spent": 1.0})


def test_an_error_in_the_evaluation_leaves_the_state():
    model, state = Model({2: 0.0, 1: 0.0}), TrialState()

    def failing(size):
        if size == 2:
            raise RuntimeError("out of memory")
        return model(size)

    with pytest.raises(RuntimeError, match="out of memory"):
        run_event([2, 1], failing, state)
    assert state == TrialState()


def test_report_holds_every_figure_in_plain_values():
    event = run_event([4, 2], Model({4: 0.5, 2: 0.0}), TrialState())
    report = json.loads(json.dumps(event.as_dict(), allow_nan=False))
    assert set(report) == {field.name for field in dataclasses.fields(event)}
    assert report["rungs"][1]["test"]["p_value"] < report["rungs"][1]["level"] == 0.005
    assert report["threshold"] == 0.01
    assert report["measured_level"] == measured_level(N)


def test_measured_level_is_that_of_the_next_smaller_tabled_n():
    assert measured_level(1437) == measured_level(1024) == MEASURED_LEVELS[1024]
    assert measured_level(1023) == measured_level(512) == MEASURED_LEVELS[512]
    assert measured_level(8) is None


@pytest.mark.parametrize(
    ("wish", "rungs", "sizes"),
    [(100, 3, [100, 50, 25]), (3, 3, [3, 1]), (1, 3, [1]), (7, 1, [7]), (5, 3, [5, 2, 1])],
)
def test_candidate_sizes(wish, rungs, sizes):
    assert candidate_sizes(wish, rungs) == sizes


def test_candidate_sizes_refuses_an_empty_wish():
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        candidate_sizes(0)


def test_minimum_interval_keeps_trials_within_their_share():
    steps = minimum_interval(1024, 32)
    assert steps == math.ceil(4 * 1024 / (0.05 * 3 * 32)) == 854
    assert 4 * 1024 / (3 * 32 * steps) <= 0.05 < 4 * 1024 / (3 * 32 * (steps - 1))
    assert minimum_interval(1024, 1024, rungs=1, share=1.0) == 1
    with pytest.raises(ValueError, match="share in"):
        minimum_interval(1024, 32, share=0.0)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_threshold_outside_0_1_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        TrialRules(threshold=threshold)


@pytest.mark.parametrize("name", ["tolerance", "absolute_tolerance", "allowance"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_tolerances_below_0_are_refused(name, value):
    with pytest.raises(ValueError, match=f"expected (a finite )?{name}"):
        TrialRules(**{name: value})


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match=r"threshold to be a number, got '0\.01'"):
        TrialRules(threshold="0.01")
    for classes, error in ((1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="classes"):
            TrialRules(classes=classes)
    model = Model({1: 0.0})
    for sizes in ([], [0], [1, 2], [2, 2]):
        with pytest.raises(ValueError, match="strictly decreasing"):
            run_event(sizes, model, TrialState())
    with pytest.raises(TypeError, match="sizes as integers"):
        run_event([1.0], model, TrialState())
    with pytest.raises(TypeError, match=r"expected a trial to return losses.*got float"):
        run_event([1], lambda size: 1.0, TrialState())
    with pytest.raises(ValueError, match="one floating-point loss per independent sample"):
        run_event([1], lambda size: torch.ones(4, 3), TrialState())
    with pytest.raises(ValueError, match="same 16 samples"):
        run_event([1], lambda size: torch.ones(16 if size is None else 12), TrialState())
