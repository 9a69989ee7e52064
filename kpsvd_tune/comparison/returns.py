"""What the money of a run buys against the base model and the baselines; small adapters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from kpsvd_tune.comparison.findings import Findings, is_kpsvd, key_of, lowest
from kpsvd_tune.report.comparison import (
    Estimate,
    MethodSummary,
    Return,
    Smallest,
    Spent,
    TrialRow,
)


def returns(found: Findings) -> Iterable[Return]:
    """The cost and the gain of a run of every summary, against the best baseline at its budget."""
    for summary in found.summaries:
        rivals = [
            each
            for each in found.summaries
            if each.budget == summary.budget and not is_kpsvd(each.method)
        ]
        baseline = lowest(rivals)
        is_itself = baseline is None or baseline is summary
        chosen = found.best[key_of(summary)]
        energies = [row.energy_joules for row in chosen if row.energy_joules is not None]
        loss, points = summary.validation_loss.mean, None
        if summary.score is not None and found.base_score is not None:
            points = 100 * (summary.score.mean - found.base_score)
        yield Return(
            method=summary.method,
            budget=summary.budget,
            hours=_hours(found, summary),
            cost=summary.cost,
            energy_joules=statistics.median(energies) if len(energies) == len(chosen) else None,
            gain=None if found.base_loss is None else found.base_loss - loss,
            points=points,
            baseline=None if is_itself or baseline is None else baseline.method,
            **_against(found, summary, None if is_itself else baseline),
        )


def _against(
    found: Findings, summary: MethodSummary, baseline: MethodSummary | None
) -> dict[str, Any]:
    """What a run takes and brings more than one of the baseline; all None where there is none."""
    if baseline is None:
        return dict.fromkeys(("extra_hours", "extra_gain", "extra_points"))
    change = found.difference(key_of(summary), key_of(baseline))
    return {
        "extra_hours": _hours(found, summary) - _hours(found, baseline),
        "extra_gain": None if change is None else change.loss.negated(),
        "extra_points": found.score_difference(key_of(summary), key_of(baseline)),
    }


def smallest_adapter(found: Findings) -> Smallest | None:
    """The one with the fewest parameters within one standard error of the best mean.

    The best is the one with the lowest mean loss, or the highest mean score where all of them are
    scored, among the summaries with the most seeds; the error is that of its own mean over seeds.
    None where that is one seed.
    """
    most = max(each.validation_loss.n for each in found.summaries)
    same = [each for each in found.summaries if each.validation_loss.n == most]
    is_scored = all(each.score is not None and each.score.n == most for each in same)
    sign = -1.0 if is_scored else 1.0

    def figure(each: MethodSummary) -> Estimate:
        return each.score if is_scored and each.score is not None else each.validation_loss

    best = min(same, key=lambda each: sign * figure(each).mean)
    deviation = figure(best).deviation
    if deviation is None:
        return None
    error = deviation / math.sqrt(most)
    limit = sign * figure(best).mean + error
    close = [each for each in same if sign * figure(each).mean <= limit]
    chosen = min(close, key=lambda each: (each.trainable_parameters, sign * figure(each).mean))
    return Smallest(
        measure="score" if is_scored else "validation loss",
        method=chosen.method,
        budget=chosen.budget,
        trainable_parameters=chosen.trainable_parameters,
        value=figure(chosen).mean,
        best=best.method,
        best_budget=best.budget,
        best_parameters=best.trainable_parameters,
        best_value=figure(best).mean,
        standard_error=error,
    )


def spent(
    rows: Sequence[TrialRow],
    device_seconds: float | None,
    price_per_hour: float | None,
    money: float | None,
) -> Spent:
    """What trials took; ``device_seconds`` is the account of the comparison, if one is kept."""
    seconds = [row.seconds for row in rows]
    joules = [row.energy_joules for row in rows if row.energy_joules is not None]
    return Spent(
        trials=len(rows),
        device_seconds=sum(seconds) if device_seconds is None else device_seconds,
        trial_seconds=statistics.fmean(seconds),
        price_per_hour=price_per_hour,
        energy_joules=sum(joules) if len(joules) == len(rows) else None,
        money=money,
    )


def _hours(found: Findings, summary: MethodSummary) -> float:
    steps = len(found.best[key_of(summary)][0].losses)
    return (summary.init_seconds + summary.seconds_per_step * steps) / 3600
