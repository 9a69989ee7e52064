"""What would decide what a comparison leaves open: seeds, steps, rows, rates, further trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kpsvd_tune.comparison.findings import Findings, key_of
from kpsvd_tune.comparison.statistics import mean_curve, seeds_needed
from kpsvd_tune.report.comparison import MethodSummary, ScoreDifference

# 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054
# A loss that falls by less, in nats, has come to its end.
_LEVEL = 0.005


def missing(
    found: Findings,
    chosen: MethodSummary,
    rivals: Sequence[MethodSummary],  # those it is not proved to be better than
    *,
    by_score: bool,
    num_missing: int,
    to_come: str = "",  # what to do about those; empty: the same command runs them
) -> Iterable[str]:
    """One sentence for each thing that is missing, the one that costs least first."""
    if num_missing:
        told = f"trials: at least {num_missing} are still to come; the same command runs them"
        yield to_come or told
    if chosen.is_edge:
        yield _rates(found, chosen)
    if by_score:
        yield from _rows(found, chosen, rivals)
    else:
        yield from _seeds(found, chosen, rivals)
    yield from _steps(found, chosen)


def rows_needed(change: ScoreDifference) -> int | None:
    """Questions whose 95 % interval leaves zero out, if the change and its spread stay.

    None where the change is zero.
    """
    if change.change == 0:
        return None
    return math.ceil(change.num_questions * (_Z * change.stderr / change.change) ** 2)


def _rates(found: Findings, chosen: MethodSummary) -> str:
    """The next rate beyond the last one tried, at the same ratio as the two last ones."""
    rates = found.rates(key_of(chosen))
    edge, inner = (rates[0], rates[1]) if chosen.learning_rate == rates[0] else rates[-1:-3:-1]
    beyond = float(f"{min(1.0, edge * edge / inner):.1g}")
    return (
        f"rates: {chosen.method} was best at the last rate tried, {edge:g}; add the next one, as "
        f"in --methods {chosen.method}:rates={edge:g}+{beyond:g}"
    )


def _seeds(
    found: Findings, chosen: MethodSummary, rivals: Sequence[MethodSummary]
) -> Iterable[str]:
    for rival in rivals:
        change = found.difference(key_of(rival), key_of(chosen))
        if change is None or change.loss.deviation is None:
            yield (
                f"seeds: {rival.method} and {chosen.method} need two or more in common to be told "
                "apart; pass --seeds 3"
            )
            continue
        loss = change.loss
        needed = seeds_needed(loss.mean, change.loss.deviation)
        told = f"{loss.mean:+.4f} nats" if loss.mean else "no difference"
        if needed is None:
            yield (
                f"seeds: more than 30 to tell {rival.method} from {chosen.method} ({told}): take "
                "the cheaper of the two"
            )
        else:
            yield (
                f"seeds: about {max(needed, loss.n + 1)}, now {loss.n}, to tell {rival.method} "
                f"from {chosen.method} if their difference stays {told}; pass --seeds "
                f"{max(needed, loss.n + 1)}"
            )


def _rows(found: Findings, chosen: MethodSummary, rivals: Sequence[MethodSummary]) -> Iterable[str]:
    for rival in rivals:
        change = found.score_difference(key_of(chosen), key_of(rival))
        if change is None:
            yield (
                f"scores: {rival.method} and {chosen.method} have no seed in common with two or "
                "more questions scored; the same command scores those that are missing"
            )
            continue
        needed = rows_needed(change)
        points = f"{100 * change.change:+.1f} points"
        if needed is None or needed > 100 * change.num_questions:
            yield (
                f"rows: more than {100 * change.num_questions:,} questions to tell {chosen.method} "
                f"from {rival.method} ({points}): take the cheaper of the two"
            )
        else:
            yield (
                f"rows: about {max(needed, change.num_questions + 1):,} questions, now "
                f"{change.num_questions:,}, to tell {chosen.method} from {rival.method} if their "
                f"difference stays {points}"
            )


def _steps(found: Findings, chosen: MethodSummary) -> Iterable[str]:
    """Longer runs, where the loss still fell by more than it leads by."""
    curve = mean_curve([row.validation_losses for row in found.best[key_of(chosen)]])
    if len(curve) < 3:
        return
    (before, earlier), (last, loss) = curve[-2:]
    leads = [
        each.validation_loss.mean - chosen.validation_loss.mean
        for each in found.summaries
        if each.budget == chosen.budget and each is not chosen
    ]
    lead = min((abs(each) for each in leads), default=0.0)
    if earlier - loss > max(_LEVEL, lead):
        yield (
            f"steps: the validation loss of {chosen.method} still fell by {earlier - loss:.4f} "
            f"nats from step {before} to the last, {last}; raise train.max_steps or train.epochs"
        )
