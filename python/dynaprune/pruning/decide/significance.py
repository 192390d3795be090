"""The paired one-sided test behind the trial: does a removal raise the mean loss by `tolerance` or more?

With `d_i = loss without the candidates - loss with them` on sample i, the null hypothesis is
`E[d] >= tolerance` (the removal is harmful) and a small p-value speaks for removing. Harm often sits in few
samples, which makes `d` skewed to the right: a batch that happens to hold few of them shows a low mean *and*
a low variance, and the plain t-test then accepts too often (5% of the events when 2% of the samples bear the
harm, 11% when 0.5% do, where 1% is nominal: `docs/trial.md`).

The skew correction is Hall's monotone completion of Johnson's modified t. With
`u = (mean(d) - tolerance) / s` and `g` the sample skewness,

    Johnson:  t_J = sqrt(n) * (u + g u^2 / 3 + g / (6 n))
    Hall:     t_H = sqrt(n) * (u + g u^2 / 3 + g^2 u^3 / 27 + g / (6 n))

    N. J. Johnson (1978), Modified t tests and confidence intervals for asymmetrical populations,
    J. Amer. Statist. Assoc. 73, 536-544, equation for t_1;
    P. Hall (1992), On the removal of skewness by transformation, J. R. Statist. Soc. B 54, 221-228, equation
    for T_2.

Johnson's parabola turns round at `u = -3 / (2 g)`: the clearer a removal is harmless, the larger its p-value
becomes. Hall's cubic term removes the turn. The p-value is the larger of the plain and the corrected one,
because under skew to the left, and with tails so heavy that `g` itself is noise, the correction would lend
the test power that its level cannot pay for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import stdtr
from torch import Tensor

MIN_SAMPLES = 8


@dataclass(frozen=True)
class PairedTest:
    """One paired test. Losses in the unit of the losses (nats); `p_value` is the one that decides.

    `p_value` is the largest of `p_mean` (the whole sample) and the class p-values; `worst_class` names the
    class with the largest (None without classes). `reason` is empty unless the figures could not be formed.
    """

    samples: int
    mean_rise: float
    standard_error: float
    skewness: float
    p_mean: float
    p_value: float
    worst_class: int | None = None
    worst_class_rise: float | None = None
    worst_class_p: float | None = None
    reason: str = ""


def harm_p_values(rise: Tensor, tolerance: float) -> Tensor:
    """p-values of `E[rise] >= tolerance` over the last dimension, skew-corrected.

    Args:
        rise: [..., n] paired differences (loss without the candidates minus loss with them), finite, n >= 2.
        tolerance: the harm of the null hypothesis, in the unit of the losses.

    Returns:
        float64 [...] on the CPU. Where all n differences are equal there is no variance to judge by: below
        the tolerance the p-value is that of the sign test, `2^-n`; at or above it, 1.
    """
    n = _samples(rise)
    d = rise.detach().to("cpu", torch.float64)
    mean = d.mean(-1)
    centred = d - mean.unsqueeze(-1)
    square = (centred * centred).sum(-1)
    cube = (centred * centred * centred).sum(-1)
    return _p_from_moments(mean, square, cube, n, tolerance)


def class_p_values(rise: Tensor, classes: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """p-values of "this class alone raises the mean loss by `tolerance` or more", for each class present.

    The tested variable is the class's contribution `y_i = d_i * [class_i = c]` over *all* n samples, so the
    mean harm within the class is held against `tolerance / share of the class`, and the class's share being
    itself drawn is part of the variance. Requiring every class to pass is an intersection-union test (R. L.
    Berger 1982, Technometrics 24, 295-300): each class is tested at the full level, no division by the number
    of classes.

    Args:
        rise: [n] paired differences.
        classes: [n] integer labels.
        tolerance: as in `harm_p_values`.

    Returns:
        (labels int64 [k], p float64 [k], contribution to the mean rise float64 [k]), all on the CPU.
    """
    n = _samples(rise)
    d = rise.detach().to("cpu", torch.float64)
    labels, group = torch.unique(classes.detach().to("cpu"), return_inverse=True)
    k = labels.numel()

    def per_class(values: Tensor) -> Tensor:
        return torch.zeros(k, dtype=torch.float64).index_add_(0, group, values)

    count = per_class(torch.ones_like(d))
    mean = per_class(d) / n
    centred = d - mean[group]
    # The n - count samples outside the class contribute y = 0.
    square = per_class(centred**2) + (n - count) * mean**2
    cube = per_class(centred**3) - (n - count) * mean**3
    return labels.to(torch.int64), _p_from_moments(mean, square, cube, n, tolerance), mean


def paired_test(
    without: Tensor, within: Tensor, tolerance: float, classes: Tensor | None = None
) -> PairedTest:
    """Test whether a removal raises the mean loss by `tolerance` or more.

    Args:
        without: [n] losses per independent sample with the candidates removed, any float dtype and device.
        within: [n] losses of the same samples in the same order with the candidates in place.
        tolerance: the harm to exclude, >= 0, in the unit of the losses.
        classes: [n] integer labels, or None for no check by class.

    Returns:
        The test; a non-finite loss gives p = 1 with the reason.

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, n < 8, a tolerance that is negative or
            not finite.
    """
    _check_pair(without, within, tolerance, classes)
    n = within.numel()
    before = within.detach().to("cpu", torch.float64)
    after = without.detach().to("cpu", torch.float64)
    for name, losses in (("with", before), ("without", after)):
        bad = n - int(torch.isfinite(losses).sum())
        if bad:
            reason = f"{bad} of {n} losses {name} the candidates are not finite"
            return PairedTest(n, math.nan, math.nan, math.nan, 1.0, 1.0, reason=reason)
    rise = after - before
    centred = rise - rise.mean()
    square = float((centred**2).sum())
    skewness = float((centred**3).mean()) / (square / n) ** 1.5 if square > 0 else 0.0
    p_mean = float(harm_p_values(rise, tolerance))
    plain = PairedTest(
        samples=n,
        mean_rise=float(rise.mean()),
        standard_error=math.sqrt(square / (n - 1) / n),
        skewness=skewness,
        p_mean=p_mean,
        p_value=p_mean,
    )
    if classes is None:
        return plain
    labels, p, contribution = class_p_values(rise, classes, tolerance)
    worst = int(p.argmax())
    share = float((classes.detach().to("cpu") == labels[worst]).sum()) / n
    return replace(
        plain,
        p_value=max(p_mean, float(p[worst])),
        worst_class=int(labels[worst]),
        worst_class_rise=float(contribution[worst]) / share,
        worst_class_p=float(p[worst]),
    )


def _check_pair(without: Tensor, within: Tensor, tolerance: float, classes: Tensor | None) -> None:
    check_losses(within, classes)
    check_losses(without, None)
    if without.shape != within.shape:
        raise ValueError(
            f"expected the same {within.numel()} samples with and without the candidates, "
            f"got {without.numel()} losses without them"
        )
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"expected a finite tolerance >= 0, got {tolerance}")


def check_losses(losses: Tensor, classes: Tensor | None) -> None:
    """Raise unless `losses` [n] are floating point, n >= 8, and `classes`, if any, integers [n]."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"expected a tensor of one loss per independent sample, got {type(losses).__name__}")
    if losses.dim() != 1 or not losses.is_floating_point():
        raise ValueError(
            "expected one floating-point loss per independent sample, shape [n] (reduction='none', averaged "
            f"over the positions of a sequence), got {losses.dtype} of shape {tuple(losses.shape)}"
        )
    if losses.numel() < MIN_SAMPLES:
        raise ValueError(f"expected at least {MIN_SAMPLES} samples in a trial, got {losses.numel()}")
    if classes is None:
        return
    if not isinstance(classes, Tensor):
        raise TypeError(f"expected classes as an integer tensor [n] or None, got {type(classes).__name__}")
    integer = not (classes.is_floating_point() or classes.is_complex())
    if classes.shape != losses.shape or not integer:
        raise ValueError(
            f"expected one integer class per sample, shape {tuple(losses.shape)}, "
            f"got {classes.dtype} of shape {tuple(classes.shape)}"
        )


def _samples(rise: Tensor) -> int:
    if rise.dim() < 1 or rise.shape[-1] < 2:
        raise ValueError(f"expected paired differences [..., n] with n >= 2, got shape {tuple(rise.shape)}")
    return int(rise.shape[-1])


def _p_from_moments(mean: Tensor, square: Tensor, cube: Tensor, n: int, tolerance: float) -> Tensor:
    """`square`, `cube`: sums of the centred powers. s^2 divides by n - 1 and the third moment by n."""
    s = (square / (n - 1)).sqrt()
    constant = s == 0
    safe = torch.where(constant, torch.ones_like(s), s)
    # Beyond 1e6 standard deviations nothing changes any more, and the powers below stay finite.
    u = ((mean - tolerance) / safe).clamp(-1e6, 1e6)
    g = cube / n / safe / safe / safe
    corrected = u + g * u**2 / 3 + g**2 * u**3 / 27 + g / (6 * n)
    statistic = math.sqrt(n) * torch.maximum(u, corrected)
    p = torch.from_numpy(np.asarray(stdtr(n - 1, statistic.numpy()), dtype=np.float64)).reshape(mean.shape)
    sign_test = torch.where(mean < tolerance, 0.5**n, 1.0).to(torch.float64)
    return torch.where(constant, sign_test, p)
