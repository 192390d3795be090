"""Intervals for the mean of paired differences: over seeds, over folds and over the rows of the test set.

Which one holds depends on what would be drawn anew. With one fixed split, seeds are independent runs of the
same task: Student's t. Folds share training rows, so their runs are not independent: the corrected interval.
The rows of the test set are a sample as well, and neither of the two knows: the bootstrap over rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_DRAWS_AT_ONCE = 1 << 20  # 12 MiB


class Interval(NamedTuple):
    """Of a mean, two-sided, and the one-sided bounds of the same level; None where one run says nothing."""

    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    low_one_sided: float | None
    high_one_sided: float | None


def paired_t_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t over independent runs, one difference each (Gosset 1908): ``s² / J`` with J - 1 degrees.

    Raises:
        ValueError: no difference, or a level outside (0, 1).
    """
    return _student(differences, 1.0 / max(len(differences), 1), level)


def corrected_interval(
    differences: Sequence[float], test_rows: float, train_rows: float, level: float = 0.95
) -> Interval:
    """The corrected-resampled interval for runs that share training rows (Nadeau and Bengio 2003, section 3).

    The variance of the mean of J differences with sample variance s² is taken as
    ``(1/J + n_test/n_train) s²``, and Student's t has J - 1 degrees of freedom.

    Raises:
        ValueError: no difference, no rows, or a level outside (0, 1).
    """
    if test_rows <= 0 or train_rows <= 0:
        raise ValueError(f"expected positive row counts, got {test_rows} test and {train_rows} training rows")
    return _student(differences, 1.0 / max(len(differences), 1) + test_rows / train_rows, level)


def _student(differences: Sequence[float], factor: float, level: float) -> Interval:
    _check_level(level)
    runs = len(differences)
    if runs < 1:
        raise ValueError("expected at least one difference, got none")
    mean = sum(differences) / runs
    if runs == 1:
        return Interval(mean, None, None, None, None, None)
    from scipy.stats import t

    error = math.sqrt(factor * sum((d - mean) ** 2 for d in differences) / (runs - 1))
    two_sided, one_sided = (error * float(t.ppf(p, runs - 1)) for p in ((1 + level) / 2, level))
    return Interval(mean, error, mean - two_sided, mean + two_sided, mean - one_sided, mean + one_sided)


def paired_bootstrap(
    differences: NDArray[np.float64], *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap over the rows of the test set (Efron and Tibshirani 1993, chapter 13).

    Both arms of every run were tested on the same rows, so a row is drawn with all its differences. The
    networks are taken as they are: what other seeds would give is not in the interval.

    Args:
        differences: ``[runs, rows]``, of what each row adds to the metric's mean (1 or 0 for accuracy, nats
            for a loss), the second arm's less the first one's.
        seed: of the resampling.

    Raises:
        ValueError: no run, no row, a number that is not finite, or a level outside (0, 1).
    """
    _check_level(level)
    if differences.ndim != 2 or 0 in differences.shape:
        raise ValueError(f"expected differences [runs, rows], got shape {list(differences.shape)}")
    if not np.isfinite(differences).all():
        raise ValueError("expected finite differences, got some that are not")
    if resamples < 100:
        raise ValueError(f"expected at least 100 resamples, got {resamples}")
    by_row = differences.mean(axis=0)
    rng, rows = np.random.default_rng(seed), len(by_row)
    at_once = max(1, _DRAWS_AT_ONCE // rows)
    parts = [min(at_once, resamples - first) for first in range(0, resamples, at_once)]
    drawn = (rng.integers(rows, size=(part, rows), dtype=np.int32) for part in parts)
    means = np.concatenate([by_row[part].mean(axis=1) for part in drawn])
    outside = (1 - level) / 2
    low, high, low_one, high_one = np.quantile(means, [outside, 1 - outside, 1 - level, level])
    return Interval(
        float(by_row.mean()), float(means.std()), float(low), float(high), float(low_one), float(high_one)
    )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, got {level}")
