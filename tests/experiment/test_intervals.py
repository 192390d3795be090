"""The intervals against scipy, against published numbers and by how often they cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dynaprune.experiment.intervals import Interval, corrected_interval, paired_bootstrap, paired_t_interval

DIFFERENCES = [0.3, -0.1, 0.4, 0.25, 0.05]


def test_the_t_interval_is_that_of_scipy() -> None:
    found = paired_t_interval(DIFFERENCES)
    low, high = stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(DIFFERENCES))
    assert found.standard_error == pytest.approx(stats.sem(DIFFERENCES))
    assert (found.low, found.high) == pytest.approx((low, high))
    one_sided = stats.ttest_1samp(DIFFERENCES, 0, alternative="greater").confidence_interval(0.95)
    assert found.low_one_sided == pytest.approx(one_sided.low)
    assert found.high_one_sided == pytest.approx(2 * found.mean - one_sided.low)


def test_the_corrected_interval_is_wider_by_the_shared_rows() -> None:
    plain, corrected = paired_t_interval(DIFFERENCES), corrected_interval(DIFFERENCES, 100, 400)
    assert corrected.standard_error == pytest.approx(
        plain.standard_error * math.sqrt((1 / 5 + 1 / 4) / (1 / 5))
    )
    assert corrected.mean == plain.mean


@pytest.mark.parametrize("found", [paired_t_interval([0.5]), corrected_interval([0.5], 10, 90)])
def test_one_run_has_a_mean_and_no_interval(found: Interval) -> None:
    assert found == (0.5, None, None, None, None, None)


def test_equal_differences_leave_no_width() -> None:
    assert paired_t_interval([0.25] * 3)[2:4] == (0.25, 0.25)
    assert paired_bootstrap(np.full((2, 7), 0.25), seed=0)[2:4] == pytest.approx((0.25, 0.25))


def test_the_bootstrap_agrees_with_scipys() -> None:
    rng = np.random.default_rng(3)
    differences = rng.choice([-1.0, 0.0, 1.0], size=(3, 400), p=[0.1, 0.75, 0.15])
    found = paired_bootstrap(differences, seed=0)
    theirs = stats.bootstrap((differences.mean(0),), np.mean, method="percentile", rng=1).confidence_interval
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * found.standard_error)
    assert found.low < found.low_one_sided < found.mean < found.high_one_sided < found.high
    assert found == paired_bootstrap(differences, seed=0) != paired_bootstrap(differences, seed=1)


def test_both_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    t_hits = row_hits = 0
    for trial in range(300):
        run = paired_t_interval(list(rng.normal(0.1, 1.0, 5)))
        t_hits += run.low <= 0.1 <= run.high
        rows = paired_bootstrap(rng.normal(0.1, 1.0, (1, 200)), seed=trial, resamples=400)
        row_hits += rows.low <= 0.1 <= rows.high
    # 300 trials at 95%: fewer than 270 or all of them would happen once in about a thousand such tests
    assert 270 <= t_hits < 300
    assert 265 <= row_hits < 300


def test_what_is_no_sample_is_refused() -> None:
    for call, message in (
        (lambda: paired_t_interval([]), "at least one difference"),
        (lambda: paired_t_interval([1.0], level=1.0), "a level between 0 and 1, got 1.0"),
        (lambda: corrected_interval([1.0], 0, 5), "positive row counts, got 0 test"),
        (lambda: paired_bootstrap(np.zeros(4), seed=0), r"\[runs, rows\], got shape \[4\]"),
        (lambda: paired_bootstrap(np.zeros((2, 0)), seed=0), r"got shape \[2, 0\]"),
        (lambda: paired_bootstrap(np.full((1, 3), np.nan), seed=0), "finite differences"),
        (lambda: paired_bootstrap(np.zeros((1, 3)), seed=0, resamples=9), "at least 100 resamples, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
