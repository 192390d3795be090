"""Boundaries of O'Brien-Fleming-type spending, against published ones and against simulation."""

import math

import numpy as np
import pytest
import scipy.stats
from scipy.special import ndtri

from dynaprune.pruning.decide.spending import nominal_levels, spent

# Critical values of Z for a one-sided level of 0.025 and equally spaced looks, alpha_1* of Lan and DeMets
# (1983), as they stand in D. M. Reboussin, D. L. DeMets, K. Kim and K. K. G. Lan (2000), Controlled Clinical
# Trials 21, 190-207, and are printed by gsDesign and ldbounds.
PUBLISHED = {
    2: [2.9626, 1.9686],
    3: [3.7103, 2.5114, 1.9930],
    4: [4.3326, 2.9631, 2.3590, 2.0141],
    5: [4.8769, 3.3569, 2.6803, 2.2898, 2.0310],
}


@pytest.mark.parametrize("looks", PUBLISHED)
def test_boundaries_are_the_published_ones(looks):
    levels = nominal_levels(0.025, [k / looks for k in range(1, looks + 1)])
    assert (-ndtri(np.array(levels))).tolist() == pytest.approx(PUBLISHED[looks], abs=2e-4)


def test_one_look_takes_the_whole_level():
    assert nominal_levels(0.01, [1.0]) == (pytest.approx(0.01),)
    assert nominal_levels(0.7, [1.0]) == (pytest.approx(0.7),)


def test_nothing_is_spent_early_and_all_at_the_end():
    fractions = np.linspace(0.05, 1, 20)
    found = [spent(0.01, f) for f in fractions]
    assert found == sorted(found) and found[-1] == pytest.approx(0.01) and found[0] < 1e-25


@pytest.mark.parametrize(("alpha", "t"), [(0.01 / 3, 0.5), (0.05, 0.3), (0.6, 0.5)])
def test_both_looks_together_reach_the_level(alpha, t):
    """By another way: the probability that neither crosses is that of a bivariate normal."""
    first, second = (ndtri(1 - level) for level in nominal_levels(alpha, [t, 1.0]))
    both = scipy.stats.multivariate_normal(cov=[[1, math.sqrt(t)], [math.sqrt(t), 1]])
    assert 1 - both.cdf([first, second]) == pytest.approx(alpha, rel=1e-3)
    assert scipy.stats.norm.sf(first) == pytest.approx(spent(alpha, t), rel=1e-6)


def test_what_is_no_level_or_no_share_is_refused():
    for fractions in ([], [0.0, 1.0], [0.5, 0.5], [0.6, 0.5], [0.5, 1.1]):
        with pytest.raises(ValueError, match="increasing shares"):
            nominal_levels(0.01, fractions)
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="level between 0 and 1"):
            nominal_levels(alpha, [1.0])
