"""How much of a test's level each look at the data may spend, and the p-values that have to be met there.

The spending function is of O'Brien-Fleming's type: by the share ``t`` of the data a one-sided test of level
``alpha`` has spent ``2 - 2 Phi(z / sqrt(t))``, with ``Phi(z) = 1 - alpha / 2``.

    P. C. O'Brien and T. R. Fleming (1979), A multiple testing procedure for clinical trials, Biometrics 35,
    549-556;
    K. K. G. Lan and D. L. DeMets (1983), Discrete sequential boundaries for clinical trials, Biometrika 70,
    659-663, alpha_1* of section 3.

The boundaries follow from it by integrating over what has not crossed before (P. Armitage, C. K. McPherson
and B. C. Rowe 1969, J. R. Statist. Soc. A 132, 235-244).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

_NODES, _FARTHEST = 256, 9.0


def spent(alpha: float, fraction: float) -> float:
    """Level that a test of level ``alpha`` has spent by this share of the data, in (0, 1]."""
    return float(2 * ndtr(ndtri(alpha / 2) / math.sqrt(fraction)))


def nominal_levels(alpha: float, fractions: Sequence[float]) -> tuple[float, ...]:
    """What the p-value has to stay below at each look, one-sided, so that all looks together reach ``alpha``.

    Args:
        alpha: level of the whole test, in (0, 1).
        fractions: shares of the data at the looks, increasing, in (0, 1]. Under the null hypothesis the
            statistic is a Brownian motion in them.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"expected a level between 0 and 1, got {alpha}")
    steps = [0.0, *map(float, fractions)]
    if len(steps) < 2 or not all(a < b <= 1 for a, b in pairwise(steps)):
        raise ValueError(f"expected increasing shares of the data in (0, 1], got {steps[1:]}")
    return _nominal_levels(float(alpha), tuple(steps[1:]))


@lru_cache(maxsize=256)
def _nominal_levels(alpha: float, fractions: tuple[float, ...]) -> tuple[float, ...]:
    levels = [spent(alpha, fractions[0])]
    at, bound = fractions[0], -float(ndtri(levels[0])) * math.sqrt(fractions[0])
    points, weights = _grid(at, bound)
    mass = weights * _density(points / math.sqrt(at)) / math.sqrt(at)
    for now in fractions[1:]:
        spread = math.sqrt(now - at)
        excess = partial(_excess, points, mass, spread, spent(alpha, now) - spent(alpha, at))
        bound = float(brentq(excess, -_FARTHEST, _FARTHEST, xtol=1e-12))
        levels.append(float(ndtr(-bound / math.sqrt(now))))
        ahead, weights = _grid(now, bound)
        moved = _density((ahead[:, None] - points[None, :]) / spread) / spread
        points, mass, at = ahead, weights * (moved @ mass), now
    return tuple(levels)


def _excess(points: np.ndarray, mass: np.ndarray, spread: float, allowed: float, bound: float) -> float:
    """By how much more than ``allowed`` crosses ``bound``, of what lies at ``points``."""
    return float((mass * ndtr((points - bound) / spread)).sum()) - allowed


def _grid(at: float, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights from far below up to ``bound``, in standard deviations at ``at``."""
    low = -_FARTHEST * math.sqrt(at)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = (bound - low) / 2
    return low + half * (nodes + 1), weights * half


def _density(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return found
