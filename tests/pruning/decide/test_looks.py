"""When a trial looks, what ends it there, and what that does to its level."""

import pytest
import torch
from scipy.special import ndtri

from dynaprune.pruning.decide.looks import few_bear_the_harm, plan_looks, predictive_power
from dynaprune.pruning.decide.significance import harm_p_values
from dynaprune.pruning.decide.spending import nominal_levels, spent
from dynaprune.pruning.decide.trial_event import run_event
from dynaprune.pruning.decide.trial_rules import TrialRules, TrialState

LEVEL = 0.01 / 3


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class InParts:
    """A model under trial whose losses come in four parts; ``rise[size]`` is what is added to them [n]."""

    def __init__(self, rise, parts=(256,) * 4, loss=2.0):
        self.rise, self._parts, self.calls = rise, parts, []
        self.losses = torch.full((sum(parts),), loss, dtype=torch.float64)

    def parts(self):
        return self._parts

    def part(self, size, first, last):
        self.calls.append((size, first, last))
        begin, end = sum(self._parts[:first]), sum(self._parts[:last])
        return (self.losses + (0 if size is None else self.rise[size]))[begin:end]

    def __call__(self, size):
        raise AssertionError("what comes in parts is asked for by part")


def event_of(model, state=None, sizes=None):
    rules = TrialRules(classes=10)  # the tolerance is 0.01 ln 10 = 0.023
    return run_event(sizes or sorted(model.rise, reverse=True), model, state or TrialState(), rules)


def test_three_looks_share_the_level_between_half_and_all():
    quarter, half, whole = plan_looks([256] * 4, LEVEL, early=True)
    assert [(look.samples, look.first, look.last) for look in (quarter, half, whole)] == [
        (256, 0, 1),
        (512, 1, 2),
        (1024, 2, 4),
    ]
    assert quarter.level == 0
    assert (half.level, whole.level) == nominal_levels(LEVEL, [0.5, 1.0])
    assert half.level == pytest.approx(3.31e-5, rel=1e-3) and whole.level == pytest.approx(3.32e-3, rel=1e-3)


def test_half_accepts_only_what_can_see_harm_in_two_percent_of_the_samples():
    for n, accepts in ((1024, True), (1000, False), (256, False)):
        looks = plan_looks([n // 4] * 4, LEVEL, early=True)
        assert (looks[1].level > 0) is accepts is (0.98 ** (n // 2) <= spent(LEVEL, 0.5))
        if not accepts:
            assert looks[2].level == LEVEL
    assert [look.level for look in plan_looks([256] * 4, LEVEL, early=False)] == [0, 0, LEVEL]


@pytest.mark.parametrize(
    ("parts", "samples"),
    [
        ([1024], [1024]),
        ([512, 512], [512, 1024]),
        ([300, 300, 300], [300, 600, 900]),
        ([4, 4, 4, 4], [8, 16]),
        ([60, 4], [64]),
        ([3] * 5, [15]),
    ],
)
def test_looks_fall_on_the_ends_of_parts_and_have_enough_samples(parts, samples):
    looks = plan_looks(parts, LEVEL, early=True)
    assert [look.samples for look in looks] == samples
    assert [look.first for look in looks[1:]] == [look.last for look in looks[:-1]]
    assert looks[0].first == 0 and looks[-1].last == len(parts)


def test_predictive_power_is_what_the_rest_of_the_samples_make_of_it():
    """By simulation: drift drawn from what a quarter of the samples say of it, then the rest."""
    t, z = 0.25, -1.2
    drift = z / t**0.5 + noise(200_000, 1) / t**0.5
    rest = drift * (1 - t) + (1 - t) ** 0.5 * noise(200_000, 2)
    passed = (z * t**0.5 + rest < float(ndtri(0.01))).double().mean()
    p = float(torch.special.ndtr(torch.tensor(z, dtype=torch.float64)))
    assert float(predictive_power(p, t, 0.01)) == pytest.approx(float(passed), abs=0.006)
    assert predictive_power(0.0, t, 0.01) == 1 and predictive_power(1.0, t, 0.01) == 0


def test_few_bear_the_harm_where_few_samples_do():
    d = 0.1 * noise(1024)
    assert not few_bear_the_harm(d, 1.0)
    assert not few_bear_the_harm(8 * noise(1024), 1.0)  # noise cancels
    assert not few_bear_the_harm(d + 1.0, 1.0)  # everybody bears it
    d[:5] += 200.0
    assert few_bear_the_harm(d, 1.0)
    assert not few_bear_the_harm(-d, 1.0)  # few gain
    assert few_bear_the_harm(torch.stack([d, -d]), 1.0).tolist() == [True, False]


def test_what_clearly_harms_is_stopped_at_a_quarter():
    model = InParts({4: 0.5 + 0.01 * noise(1024)})
    event = event_of(model)
    assert model.calls == [(None, 0, 1), (4, 0, 1)]
    assert event.accepted_size is None and event.rungs[0].test.samples == 256
    assert event.rungs[0].reason.endswith("at 256 of 1024 samples: it passes with a probability of 0 only")
    assert event.evaluated == 512 and event.samples == 1024


def test_half_accepts_once_all_samples_of_a_set_were_looked_at():
    model, state = InParts({4: 0.001 * noise(1024)}), TrialState()
    first = event_of(model, state)
    assert model.calls[-1] == (4, 2, 4) and first.accepted_size == 4 and state.early is True
    assert first.rungs[0].test.samples == 1024 and first.rungs[0].level == LEVEL * 3
    model.calls.clear()
    second = event_of(model, state)
    assert model.calls == [(None, 0, 1), (4, 0, 1), (None, 1, 2), (4, 1, 2)]
    assert second.accepted_size == 4 and second.rungs[0].test.samples == 512
    assert second.rungs[0].level == nominal_levels(0.01, [0.5, 1.0])[0]
    assert second.evaluated == 1024


def test_a_run_that_has_seen_harm_in_few_samples_never_accepts_at_half_again():
    """0.5% of the samples bear it all; the first 512 of the next sets hold none of them."""
    state = TrialState(early=True)
    rare = 0.001 * noise(1024)
    rare[::200] += 5.0
    event_of(InParts({4: rare}), state)
    assert state.early is False
    hidden = 0.001 * noise(1024)
    hidden[600:1024:80] += 5.0
    missed = event_of(InParts({4: hidden}), TrialState(early=True))
    assert missed.accepted_size == 4 and missed.rungs[0].test.samples == 512
    found = event_of(InParts({4: hidden}), state)
    assert found.accepted_size is None and found.rungs[0].test.samples == 1024
    harmless = event_of(InParts({4: 0.001 * noise(1024)}), state)
    assert harmless.accepted_size == 4 and harmless.rungs[0].test.samples == 1024 and state.early is False


def test_later_sets_use_what_is_known_of_the_model_as_it_stands():
    model = InParts({4: 0.5 + 0.01 * noise(1024), 2: 0.001 * noise(1024)})
    assert event_of(model).accepted_size == 2
    whole = [call for call in model.calls if call[0] is None]
    assert whole == [(None, 0, 1), (None, 1, 2), (None, 2, 4)]


def test_without_classes_the_scale_is_that_of_all_samples():
    model, state = InParts({4: 0.5 + 0.01 * noise(1024)}), TrialState()
    run_event([4], model, state)
    assert model.calls == [(None, 0, 4), (4, 0, 1)] and state.scale == pytest.approx(2.0)


def test_a_part_that_gives_another_number_of_losses_is_refused():
    model = InParts({4: torch.zeros(1024)})
    model.losses = model.losses[:1000]
    model.rise[4] = torch.zeros(1000)
    with pytest.raises(ValueError, match="expected the 512 losses of the parts 2 to 4, got 488"):
        event_of(model)


def test_losses_that_are_not_finite_are_left_out_of_their_part():
    model = InParts({4: 0.001 * noise(1024)})
    model.losses[[3, 700]] = torch.nan
    event = event_of(model)
    assert event.accepted_size == 4 and event.left_out == 2 and event.samples == 1022
    model.losses[:20] = torch.nan
    event = event_of(model)
    assert not event.usable and event.reason.startswith("20 of 1024 losses")


def test_the_level_of_three_looks_is_that_of_one():
    """Gaussian harm of exactly the tolerance, 20,000 tests at 0.05: within five standard errors."""
    level, d = 0.05, 1 + 4 * noise(20_000 * 128, 7).view(-1, 128)
    first, second = nominal_levels(level, [0.5, 1.0])
    half, whole = harm_p_values(d[:, :64], 1.0), harm_p_values(d, 1.0)
    either = ((half < first) | (whole < second)).double().mean()
    assert float(either) == pytest.approx(level, abs=5 * (level * (1 - level) / 20_000) ** 0.5)
