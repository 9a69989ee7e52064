"""Means with confidence intervals over few seeds, and figures read off one run's curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from kpsvd_tune.report.comparison import Estimate

# 97.5 % quantiles of Student's t by degrees of freedom, from any table of the distribution.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
# 97.5 % quantile of the normal distribution.
_Z = statistics.NormalDist().inv_cdf(0.975)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and 95 % confidence interval of the mean, by Student's t.

    The values are one a seed, at least one; seeds are taken as independent and normal.
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None, None, None, 1)
    deviation = statistics.stdev(values)
    half = _quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return Estimate(mean, deviation, mean - half, mean + half, len(values))


def _quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table by its expansion (Fisher 1925)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    return _Z + first / freedom + second / freedom**2


def seeds_needed(mean: float, deviation: float) -> int | None:
    """The fewest seeds whose 95 % interval leaves zero out, if mean and deviation stay.

    None where even the 31 seeds of the table above do not.
    """
    for number, quantile in enumerate(_T, start=2):
        if quantile * deviation / math.sqrt(number) < abs(mean):
            return number
    return None


def variation(norms: Sequence[float], num_warmup: int) -> float:
    """Deviation over mean of the gradient norms after warm-up; 0 where fewer than two are left."""
    rest = norms[num_warmup:]
    mean = statistics.fmean(rest) if rest else 0.0
    return statistics.stdev(rest) / mean if len(rest) > 1 and mean > 0 else 0.0


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over seeds of (step, validation loss), at the steps that all of them have."""
    shared = set.intersection(*({step for step, _ in curve} for curve in curves))
    losses = [dict(curve) for curve in curves]
    return [
        (step, math.fsum(each[step] for each in losses) / len(losses)) for step in sorted(shared)
    ]


def steps_to(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Steps until a curve of (step, validation loss) first falls to a loss.

    The step is on straight lines between validations; None where the curve never falls so far.
    """
    for (step, before), (later, after) in zip(curve, curve[1:], strict=False):
        if before <= loss:
            return float(step)
        if after <= loss:
            return step + (later - step) * (before - loss) / (before - after)
    return float(curve[-1][0]) if curve and curve[-1][1] <= loss else None
