"""What trials may cost: earned evenly, spent by what was counted, and what happens where it does not do."""

import json
import math
import warnings

import pytest

from dynaprune.pruning.decide.trial_budget import TrialBudget
from dynaprune.pruning.decide.trial_rules import TrialRules


def budget(**changes):
    """5% of 1,000 steps of 32 samples, all earned at step 500, for trials of 96 samples."""
    chosen = {"share": 0.05, "planned": 1000, "end": 500, "samples": 96, "batch_size": 32}
    return TrialBudget.of(**{**chosen, **changes})


def test_it_is_earned_evenly_until_the_schedule_ends():
    assert [budget().earned(step) for step in (0, 100, 500, 900)] == [0, 10, 50, 50]
    assert budget(end=None).earned(500) == 25
    assert budget(planned=None, end=None).earned(100) == 5
    assert budget(share=None).earned(0) == math.inf


def test_an_event_needs_the_model_as_it_stands_and_one_set():
    made = budget()
    assert made.needed() == pytest.approx(2)  # 2 x 96 samples, three forward passes of 32 are a step
    assert not made.allows_event(19) and made.allows_event(20)
    made.pay(96, 384, 2.0)
    assert made.spent == pytest.approx(2.0) and made.per_sample == pytest.approx(2 / 384)
    assert not made.allows_event(29) and made.allows_event(30)
    assert made.allows(30, 192, 0.0) and not made.allows(30, 193, 0.0) and not made.allows(30, 192, 0.1)


def test_what_is_not_known_yet_does_not_hold_the_first_event():
    made = budget(samples=None, batch_size=None)
    assert made.needed() == 0 and made.allows_event(0)
    made.pay(96, 192, 30.0)
    assert made.needed() == pytest.approx(30) and not made.allows_event(500)


def test_what_cannot_be_counted_is_estimated_or_said():
    made = budget()
    made.pay(96, 192, 0.0)
    assert made.spent == pytest.approx(2)
    unknown = budget(batch_size=None)
    with pytest.warns(RuntimeWarning, match=r"budget \(0\.05 of the training's FLOPs\) is not held"):
        unknown.pay(96, 192, 0.0)
    assert unknown.spent == 0


def test_waiting_warns_once_where_units_go_untested():
    made = budget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.wait(5, 0)
    with pytest.warns(RuntimeWarning, match="cost 2 dense steps.* 1 are earned .* 7 units"):
        made.wait(10, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.wait(15, 3)
    assert (made.waited, made.untested) == (3, 10)


def test_a_budget_that_no_event_will_fit_in_is_said():
    made = budget(samples=10_000)
    with pytest.warns(RuntimeWarning, match="Nothing is tested, and nothing removed"):
        made.wait(10, 0)


def test_it_is_saved():
    made = budget()
    made.pay(90, 180, 3.0)
    made.waited, made.untested, made.said = 4, 9, True
    resumed = budget()
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert resumed == made
    resumed.load_state_dict({})
    assert (resumed.spent, resumed.waited, resumed.untested, resumed.said) == (0, 0, 0, False)
    assert resumed.per_sample == made.per_sample


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ValueError, match="trial_budget"):
        TrialRules(trial_budget=share)


def test_all_and_no_limit_are_shares():
    assert TrialRules(trial_budget=None).trial_budget is None and TrialRules(trial_budget=1).trial_budget == 1
    with pytest.raises(TypeError, match="trial_budget to be a number, got '5%'"):
        TrialRules(trial_budget="5%")
