import math
import runpy
from pathlib import Path

import pytest
import scipy.stats
import torch

from dynaprune.pruning.decide.significance import class_p_values, harm_p_values, paired_test
from dynaprune.pruning.decide.trial_event import MEASURED_LEVELS

LEVELS = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "trial_level.py"))
SHAPES, acceptance = LEVELS["SHAPES"], LEVELS["acceptance"]
PROMISED = [(name, noise) for name, (_, noises, promised) in SHAPES.items() if promised for noise in noises]


def rise(n=200, seed=0, mean=0.0):
    return mean + torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("name", "noise"), PROMISED)
def test_harm_at_the_tolerance_is_accepted_in_at_most_2_percent_of_the_events(name, noise):
    found = acceptance(SHAPES[name][0], 3000, 1024, noise, 1.0, seed=17)
    assert found.single <= 0.02
    assert found.whole <= 0.02
    assert found.event <= 0.02
    assert found.unwarned <= 0.02


def test_the_tabled_level_is_the_one_simulated():
    """Worst promised shape at n = 256, from fresh draws: within four standard errors of the table."""
    worst = max(acceptance(SHAPES[name][0], 5000, 256, noise, 1.0, seed=23).event for name, noise in PROMISED)
    tabled = MEASURED_LEVELS[256]
    assert abs(worst - tabled) < 4 * math.sqrt(tabled * (1 - tabled) / 5000) + 0.002
    assert MEASURED_LEVELS[1024] <= 0.02


def test_gaussian_level_is_the_nominal_one_and_not_far_below():
    found = acceptance(SHAPES["Gaussian"][0], 5000, 1024, 10.0, 1.0, seed=3)
    assert 0.006 < found.single < 0.014  # 15,000 tests: 0.01 within five standard errors
    assert 0.004 < found.event < 0.016
    assert 0.25 < found.used < 0.6  # most harmful sets are stopped before their last look


def test_rare_harm_passes_early_only_where_the_run_has_not_seen_any():
    found = acceptance(SHAPES["in 0.5% of the samples"][0], 3000, 1024, 3.0, 1.0, seed=9)
    assert found.whole < 0.03 and found.event < 0.045
    assert found.unwarned > 0.15  # what docs/trial.md says cannot be helped


@pytest.mark.parametrize(
    ("shape", "noise", "mean", "least"),
    [
        ("Gaussian", 6.0, 0.0, 0.98),
        ("Gaussian", 4.0, 0.25, 0.98),
        ("Student t, 3 degrees", 6.0, 0.0, 0.95),
        ("normal x lognormal(1)", 6.0, 0.0, 0.90),
        ("lognormal, sigma 1", 4.0, 0.0, 0.90),
        ("lognormal to the left, sigma 1.5", 4.0, 0.0, 0.95),
    ],
)
def test_a_harmless_removal_passes_its_first_test(shape, noise, mean, least):
    assert LEVELS["single_rung_power"](SHAPES[shape][0], 2000, 1024, noise, mean, seed=5) >= least


def test_the_check_by_class_finds_harm_that_the_mean_hides_and_costs_little():
    without, with_check = LEVELS["class_acceptance"](10.0, -10 / 9, 1000, 1024, 3.0, seed=1)
    assert without > 0.95
    assert with_check <= 0.02
    without, with_check = LEVELS["class_acceptance"](0.0, 0.0, 1000, 1024, 6.0, seed=1)
    assert with_check > without - 0.02 > 0.95


def test_without_skewness_the_p_value_is_students():
    d = rise()
    d = torch.cat([d, -d])  # exactly symmetric, but for the tolerance
    expected = scipy.stats.ttest_1samp(d.numpy(), 0.1, alternative="less").pvalue
    assert float(harm_p_values(d, 0.1)) == pytest.approx(expected, rel=1e-9)


def test_statistic_follows_hall_and_never_falls_below_students():
    d = torch.exp(1.2 * rise(300, seed=4))
    n, x = d.numel(), d.numpy()
    tolerance = x.mean() + 0.2
    u, g = (x.mean() - tolerance) / x.std(ddof=1), ((x - x.mean()) ** 3).mean() / x.std(ddof=1) ** 3
    hall = math.sqrt(n) * ((1 + g * u / 3) ** 3 / g - 1 / g + g / (6 * n))
    assert float(harm_p_values(d, tolerance)) == pytest.approx(scipy.stats.t.cdf(hall, n - 1), rel=1e-9)
    student = scipy.stats.ttest_1samp(
        -x, -tolerance - 2 * x.mean() + 2 * tolerance, alternative="less"
    ).pvalue
    assert float(harm_p_values(-d, -tolerance + 2 * (tolerance - x.mean()))) == pytest.approx(
        student, rel=1e-9
    )


def test_the_clearer_the_smaller_even_under_strong_skew():
    """Johnson's parabola would turn round here; Hall's cubic may rest but never rises with the tolerance."""
    d = torch.zeros(1024, dtype=torch.float64)
    d[:3] = 1e-7
    p = torch.stack([harm_p_values(d, tolerance) for tolerance in torch.logspace(-9, 0, 40).tolist()])
    assert bool((p.diff() <= 0).all())
    assert float(p[-1]) < 1e-12


def test_batched_p_values_equal_single_ones():
    d = torch.stack([rise(seed=s) for s in range(6)]).view(2, 3, -1)
    batched = harm_p_values(d, 0.2)
    assert batched.shape == (2, 3)
    single = [float(harm_p_values(row, 0.2)) for row in d.view(6, -1)]
    assert batched.flatten().tolist() == pytest.approx(single, rel=1e-12)


def test_class_p_values_are_those_of_the_contributions():
    d = rise(500, seed=2) * 3
    classes = torch.randint(-1, 7, (500,), generator=torch.Generator().manual_seed(0))
    labels, p, contribution = class_p_values(d, classes, 0.3)
    assert labels.tolist() == sorted(set(classes.tolist()))
    for label, value, mean in zip(labels, p, contribution, strict=True):
        y = d * (classes == label)
        assert float(value) == pytest.approx(float(harm_p_values(y, 0.3)), rel=1e-9)
        assert float(mean) == pytest.approx(float(y.mean()), abs=1e-15)


def test_the_result_names_the_worst_class():
    classes = torch.arange(400) % 4
    before = rise(400, seed=1).abs()
    after = before + 0.01 * rise(400, seed=2) + 0.4 * (classes == 2) - 0.2 * (classes == 1)
    test = paired_test(after, before, 0.1, classes)
    assert test.p_mean < 1e-4 < 0.05 < test.p_value == test.worst_class_p
    assert test.worst_class == 2
    assert test.worst_class_rise == pytest.approx(0.4, abs=0.01)
    assert test.mean_rise == pytest.approx(0.05, abs=0.01)
    plain = paired_test(after, before, 0.1)
    assert plain.p_value == plain.p_mean == test.p_mean
    assert plain.worst_class is None


def test_figures_are_those_of_the_differences():
    before, d = rise(100, seed=7).abs().float(), torch.exp(rise(100, seed=8)).float()
    after = before + d
    x = (after.double() - before.double()).numpy()
    test = paired_test(after, before, 1.0)
    assert test.samples == 100
    assert test.mean_rise == pytest.approx(x.mean(), rel=1e-12)
    assert test.standard_error == pytest.approx(scipy.stats.sem(x), rel=1e-12)
    assert test.skewness == pytest.approx(scipy.stats.skew(x), rel=1e-9)


def test_a_removal_that_changes_nothing_passes_by_the_sign_test():
    losses = rise(64).abs()
    assert paired_test(losses, losses, 0.1).p_value == 0.5**64
    assert paired_test(losses, losses, 0.0).p_value == 1.0
    few = losses[:8]
    assert paired_test(few, few, 0.1).p_value == 0.5**8 > 0.01 / 3


def test_equal_harm_everywhere_is_rejected():
    losses = torch.ones(64)
    assert paired_test(losses + 0.25, losses, 0.25).p_value == 1.0
    assert paired_test(losses + 0.125, losses, 0.25).p_value < 1e-10


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["with", "without"])
def test_a_loss_that_is_not_finite_rejects_with_a_reason(value, where):
    before, after = torch.ones(32), torch.ones(32)
    (before if where == "with" else after)[5] = value
    test = paired_test(after, before, 0.1, torch.arange(32) % 2)
    assert test.p_value == 1.0
    assert test.reason == f"1 of 32 losses {where} the candidates are not finite"


def test_huge_and_tiny_losses_stay_finite():
    for scale in (1e38, 1e-38, 1e-300):
        base = torch.ones(64, dtype=torch.float64) * scale
        p = paired_test(base + scale * 1e-3 * rise(64), base, 0.1 * scale).p_value
        assert 0 <= p <= 1e-6
    assert 0 <= float(harm_p_values(1e-150 * rise(64), 1.0)) <= 1e-6


@pytest.mark.parametrize(
    ("without", "within", "tolerance", "classes", "message"),
    [
        (torch.ones(9), torch.ones(10), 0.1, None, "same 10 samples .* got 9"),
        (torch.ones(10, 2), torch.ones(10, 2), 0.1, None, r"shape \[n\].*\(10, 2\)"),
        (torch.ones(()), torch.ones(()), 0.1, None, r"shape \[n\].*shape \(\)"),
        (torch.ones(10).long(), torch.ones(10).long(), 0.1, None, "floating-point.*int64"),
        (torch.ones(7), torch.ones(7), 0.1, None, "at least 8 samples.*got 7"),
        (torch.ones(10), torch.ones(10), -0.1, None, "tolerance >= 0, got -0.1"),
        (torch.ones(10), torch.ones(10), math.nan, None, "tolerance >= 0, got nan"),
        (
            torch.ones(10),
            torch.ones(10),
            0.1,
            torch.ones(9).long(),
            r"shape \(10,\), got torch.int64.*\(9,\)",
        ),
        (torch.ones(10), torch.ones(10), 0.1, torch.ones(10), r"integer class.*torch.float32"),
    ],
)
def test_wrong_input_is_refused(without, within, tolerance, classes, message):
    with pytest.raises(ValueError, match=message):
        paired_test(without, within, tolerance, classes)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match=r"expected a tensor.*got list"):
        paired_test([1.0] * 10, torch.ones(10), 0.1)
    with pytest.raises(TypeError, match=r"expected classes as an integer tensor.*got list"):
        paired_test(torch.ones(10), torch.ones(10), 0.1, [0] * 10)
