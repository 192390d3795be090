"""Which interval a paired difference of arms has, as plain values: over seeds, over folds, over test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynaprune.experiment.intervals import (
    Interval,
    corrected_interval,
    paired_bootstrap,
    paired_t_interval,
)

__all__ = ["Rows", "of_folds", "of_rows", "of_runs", "of_seeds", "resampled"]

Rows = Mapping[str, Any]


def resampled(fixed_test: bool, config: Mapping[str, Any]) -> bool:
    """Whether runs of a task draw their test part anew: its folds, or a part drawn by the seed."""
    return not fixed_test or config.get("folds") is not None


def of_seeds(differences: Sequence[float], *, lower_is_better: bool = False) -> dict[str, float | None]:
    """Student's t over seeds on a fixed test part; see `paired_t_interval`.

    ``low`` and ``high`` bound the two-sided 95% interval of ``mean``; ``low_one_sided`` is the lower bound of
    the same level. Where ``lower_is_better``, ``high_one_sided``, the upper one, takes its place. With a
    single run the bounds are None. ValueError for no run."""
    return _said(paired_t_interval(differences), lower_is_better)


def of_folds(
    differences: Sequence[float], test_rows: float, train_rows: float, *, lower_is_better: bool = False
) -> dict[str, float | None]:
    """As `of_seeds`, for runs whose test part is drawn anew from the same rows: see `corrected_interval`."""
    return _said(corrected_interval(differences, test_rows, train_rows), lower_is_better)


def of_runs(
    differences: Sequence[float],
    rows: tuple[float, float],
    *,
    resampled: bool,
    lower_is_better: bool = False,
) -> dict[str, float | None]:
    """`of_folds` for ``resampled`` runs, else `of_seeds`; ``rows`` are those of training and test part."""
    if not resampled:
        return of_seeds(differences, lower_is_better=lower_is_better)
    train, test = rows
    return of_folds(differences, test, train, lower_is_better=lower_is_better)


def of_rows(pairs: Sequence[tuple[Any, Any]]) -> dict[str, float] | None:
    """The bootstrap over the rows of a fixed test part; None where a run has kept none.

    A language model has a vocabulary of its own in each run, and so has its rows: those of one place in the
    text are drawn together.

    Args:
        pairs: of each run, what every row adds to the metric, ``[rows]``: of the first arm and of the second.

    Returns:
        ``mean``, ``low`` and ``high`` of second - first, and the number of ``rows``.

    Raises:
        ValueError: arms of one run with other numbers of rows.
    """
    if not pairs or any(first is None or second is None for first, second in pairs):
        return None
    for first, second in pairs:
        if len(first) != len(second):
            raise ValueError(f"expected as many test rows in both arms, got {len(first)} and {len(second)}")
    differences = [np.asarray(second) - np.asarray(first) for first, second in pairs]
    count = min(map(len, differences))
    found = paired_bootstrap(np.stack([_in_places(each, count) for each in differences]), seed=0)
    assert found.low is not None and found.high is not None
    return {"mean": found.mean, "low": found.low, "high": found.high, "rows": count}


def _in_places(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """``count`` sums of neighbours whose mean is that of ``values``."""
    if len(values) == count:
        return values
    starts = np.arange(count) * len(values) // count
    return np.add.reduceat(values, starts) * count / len(values)


def _said(interval: Interval, lower_is_better: bool) -> dict[str, float | None]:
    bound = "high_one_sided" if lower_is_better else "low_one_sided"
    return {
        "mean": interval.mean,
        "standard_error": interval.standard_error,
        "low": interval.low,
        "high": interval.high,
        bound: getattr(interval, bound),
    }
