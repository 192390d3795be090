"""When a trial looks at its losses, and what ends it: a clear pass at half, or no hope from a quarter on.

Three looks: at a quarter, at half and at all of the samples, or where the parts that the samples come in end
next. A quarter never accepts: so few samples miss rare harm too often. Half and all share the level by
O'Brien-Fleming spending (:mod:`spending`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from torch import Tensor

from dynaprune.pruning.decide.significance import MIN_SAMPLES
from dynaprune.pruning.decide.spending import nominal_levels, spent

LOOK_AT = (0.25, 0.5)
ACCEPT_FROM = 0.5
FUTILE = 0.05
RARE = 0.02
BORNE_BY_FEW = 0.25


@dataclass(frozen=True)
class Look:
    """One look at the losses.

    Attributes:
        samples: that are looked at, from the first on.
        first, last: the parts that it adds: ``first`` up to but not including ``last``.
        level: what the p-value has to stay below to accept; 0: nothing is accepted here.
    """

    samples: int
    first: int
    last: int
    level: float


def plan_looks(parts: Sequence[int], level: float, *, early: bool) -> tuple[Look, ...]:
    """The looks of one test of level ``level`` at samples that come in ``parts`` of so many each.

    Args:
        early: accept before the last look, where the samples there suffice: the level that has been spent by
            then has to cover a batch without any of the :data:`RARE` share of the samples that all harm may
            fall on.
    """
    ends = list(accumulate(parts))
    total = ends[-1]
    last: list[int] = []
    for share in LOOK_AT:
        i = next(i for i, end in enumerate(ends) if end >= share * total)
        before = ends[last[-1]] if last else 0
        if ends[i] - before >= MIN_SAMPLES and total - ends[i] >= MIN_SAMPLES:
            last.append(i)
    open_ = [i for i in last if early and _accepts(ends[i], total, level)]
    levels = nominal_levels(level, [*(ends[i] / total for i in open_), 1.0]) if open_ else (level,)
    at = dict(zip([*open_, len(ends) - 1], levels, strict=True))
    stops = [*last, len(ends) - 1]
    return tuple(
        Look(ends[stop], begin, stop + 1, at.get(stop, 0.0))
        for begin, stop in zip([0, *(i + 1 for i in last)], stops, strict=True)
    )


def _accepts(samples: int, total: int, level: float) -> bool:
    share = samples / total
    return share >= ACCEPT_FROM and (1 - RARE) ** samples <= spent(level, share)


def predictive_power(p_value: ArrayLike, fraction: float, level: float) -> np.ndarray:
    """Probability that the p-value of all samples stays below ``level``, given that of a share of them.

    The statistic is taken for a Brownian motion with a drift that is known from these samples only (flat
    prior): ``Z ~ N(z / sqrt(t), (1 - t) / t)`` (D. J. Spiegelhalter, L. S. Freedman and P. R. Blackburn 1986,
    Controlled Clinical Trials 7, 8-17).

    Args:
        fraction: that share, in (0, 1).
    """
    reached = ndtri(np.asarray(p_value, dtype=np.float64))
    spread = math.sqrt((1 - fraction) / fraction)
    found: np.ndarray = ndtr((ndtri(level) - reached / math.sqrt(fraction)) / spread)
    return found


def few_bear_the_harm(rise: Tensor, tolerance: float) -> Tensor:
    """Whether few samples bear much of the harm, over the last dimension: bool ``[...]`` on the CPU.

    Few is :data:`RARE` of them, those that rise most, over the median and less what as many fall most under
    it: noise cancels. Much is a quarter of the tolerance, or of the mean rise where that is more.

    Args:
        rise: ``[..., n]`` paired differences, as for ``harm_p_values``.
    """
    ordered = rise.detach().to("cpu", torch.float64).sort(-1).values
    n = ordered.shape[-1]
    few = math.ceil(RARE * n)
    ends = ordered[..., -few:].sum(-1) + ordered[..., :few].sum(-1)
    borne = (ends - 2 * few * ordered[..., (n - 1) // 2]) / n
    return borne >= BORNE_BY_FEW * ordered.mean(-1).clamp(min=tolerance)
