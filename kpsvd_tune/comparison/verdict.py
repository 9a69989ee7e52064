"""The verdict on a comparison: what to do, what the trials leave open, and what to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from kpsvd_tune.comparison.claims import EQUAL_NATS, judge, unequal_sizes
from kpsvd_tune.comparison.findings import Findings, is_kpsvd, key_of, lowest
from kpsvd_tune.comparison.methods import is_ours
from kpsvd_tune.comparison.missing import missing
from kpsvd_tune.comparison.returns import returns, smallest_adapter, spent
from kpsvd_tune.errors import some_of
from kpsvd_tune.report.comparison import (
    Comparison,
    Difference,
    MethodSummary,
    Recommendation,
    ScoreDifference,
    TrialRow,
    TrialScore,
    percent_plus_minus,
)
from kpsvd_tune.units import counted

_LISTED = 6


def compare_rows(
    rows: Sequence[TrialRow],  # at least one that did not fail
    *,
    model: str,
    steps: int,  # optimiser steps of a trial
    base: Mapping[str, float | None],  # losses of the base model
    num_warmup: int,  # steps left out of the gradients' variation
    max_grad_norm: float | None,  # where gradients were clipped; None: nowhere
    price_per_hour: float | None = None,  # of one device; None: no costs
    currency: str = "USD",
    num_missing: int = 0,  # trials still to come; with any, no claim is judged
    to_come: str = "",  # what to do about them; empty: the same command runs them
    jobs: int = 1,  # trials that ran at a time
    notes: Sequence[str] = (),  # what a reader must know of the plan
    base_score: TrialScore | None = None,  # of the base model; None: not scored
    device_seconds: float | None = None,  # of all calls so far; None: the sum of the trials
    money: float | None = None,  # the budget of --money; None: without one
    lines: Callable[[TrialRow], tuple[str, ...]] = lambda _: (),  # to use what a trial trained
) -> Comparison:
    """Draw the verdict; an InputError says that no trial ended with a loss.

    Each method is judged at each budget by its best learning rate: the lowest mean validation
    loss among the rates that were run with the most seeds there and failed on none. Test losses
    are reported for those and never looked at in a choice. Rates are chosen by the loss also where
    a task was scored; methods are then chosen by the score.
    """
    found = Findings(
        rows,
        base=base,
        steps=steps,
        num_warmup=num_warmup,
        max_grad_norm=max_grad_norm,
        price_per_hour=price_per_hour,
        base_score=base_score,
    )
    keys = [key_of(each) for each in found.summaries]
    changes = [found.score_difference(one, other) for one in keys for other in keys if one != other]
    return Comparison(
        model=model,
        steps=steps,
        base=dict(base),
        recommendation=_recommend(found, num_missing, to_come, lines),
        reference=found.reference,
        summaries=found.summaries,
        differences=tuple(found.differences()),
        claims=() if num_missing else judge(found),
        notes=(*_notes(found, num_missing, jobs), *notes),
        currency=currency,
        returns=tuple(returns(found)),
        smallest=smallest_adapter(found),
        spent=spent(rows, device_seconds, price_per_hour, money),
        task=None if base_score is None else f"{base_score.task}, {base_score.asked}",
        base_score=found.base_score,
        score_differences=tuple(each for each in changes if each is not None),
    )


def _recommend(
    found: Findings,
    num_missing: int,
    to_come: str,
    lines: Callable[[TrialRow], tuple[str, ...]],
) -> Recommendation:
    """Name the method, size and rate to take, what is not proved, and what would prove it.

    That with the highest mean score where the summaries with the most seeds are all scored, else
    that with the lowest mean validation loss among them. What is better than what is decided by
    the 95 % intervals of the paired differences, at the size that was chosen.
    """
    best = lowest(found.summaries)
    assert best is not None
    scored = _best_score(found)
    chosen = best if scored is None else scored
    rivals = [
        each for each in found.summaries if each.budget == chosen.budget and each is not chosen
    ]
    judged = _by_loss(found, chosen, rivals) if scored is None else _by_score(found, chosen, rivals)
    open_settings = tuple(_open_settings(found, chosen, num_missing, by_score=scored is not None))
    needed = tuple(
        missing(
            found,
            chosen,
            judged.rivals,
            by_score=scored is not None,
            num_missing=num_missing,
            to_come=to_come,
        )
    )
    if not judged.is_gain:
        needed = (*needed, "a gain: try lower rates, more steps (train.max_steps) or more rows")
        return Recommendation(judged.text, open_settings, missing=needed)
    use = lines(found.best[key_of(chosen)][0])
    return Recommendation(judged.text, (*judged.undecided, *open_settings), use, needed)


class _Judged(NamedTuple):
    """What is said of the chosen method."""

    text: str
    is_gain: bool  # whether it is better than the base model
    undecided: tuple[str, ...]
    rivals: list[MethodSummary]  # those it is not proved to be better than


def _what(chosen: MethodSummary) -> str:
    return (
        f"{chosen.method} at {chosen.learning_rate:g} with {chosen.trainable_parameters:,} "
        "trainable parameters"
    )


def _by_loss(found: Findings, chosen: MethodSummary, others: list[MethodSummary]) -> _Judged:
    loss, start = chosen.validation_loss.mean, found.base_loss
    what = _what(chosen)
    if start is not None and loss >= start:
        text = (
            f"On this data take none of them: the best, {what}, has a validation loss of "
            f"{loss:.4f} after {counted(found.steps, 'step')}, and the base model has {start:.4f}."
        )
        return _Judged(text, False, (), [])
    against = "" if start is None else f", where the base model has {start:.4f}"
    test = ""
    if chosen.test_loss is not None:
        test = f" (test loss {chosen.test_loss.mean:.4f}, which no choice looked at)"
    rivals = [(each.method, found.difference(key_of(each), key_of(chosen))) for each in others]
    undecided = tuple(
        f"whether it is better than {other} ({_lead(change, other, chosen.method)})"
        for other, change in rivals
        if not _is_above(change)
    )
    open_ = [
        each for each, (_, change) in zip(others, rivals, strict=True) if not _is_above(change)
    ]
    text = (
        f"On this data take {what}, because its validation loss after "
        f"{counted(found.steps, 'step')} is "
        f"{loss:.4f}{test}{against}; {_standing(rivals)}."
    )
    return _Judged(text, True, undecided, open_)


def _best_score(found: Findings) -> MethodSummary | None:
    """The highest mean score among the summaries with the most seeds; None unless all have one."""
    most = max(each.validation_loss.n for each in found.summaries)
    same = [each for each in found.summaries if each.validation_loss.n == most]
    if any(each.score is None for each in same):
        return None
    # Equal scores, which few questions often give, are told apart by the loss.
    return max(same, key=lambda each: (_score(each), -each.validation_loss.mean))


def _by_score(found: Findings, chosen: MethodSummary, others: list[MethodSummary]) -> _Judged:
    what, start = _what(chosen), found.base_score
    assert chosen.score is not None
    assert found.asked is not None
    score = percent_plus_minus(chosen.score)
    if start is not None and chosen.score.mean <= start:
        text = (
            f"On this data take none of them: the best, {what}, scores {score} on "
            f"{found.asked[0]} after {counted(found.steps, 'step')}, and the base model "
            f"{100 * start:.1f} %."
        )
        return _Judged(text, False, (), [])
    rivals = [(each, found.score_difference(key_of(chosen), key_of(each))) for each in others]
    proved = [each for each, change in rivals if change is not None and change.interval()[0] > 0]
    open_ = [each for each, _ in rivals if each not in proved]
    undecided = tuple(
        f"whether it scores higher than {each.method} "
        f"({_score_lead(change, chosen.method, each.method)})"
        for each, change in rivals
        if each in open_
    )
    against = "" if start is None else f", where the base model has {100 * start:.1f} %"
    standing = (
        "no other method was tried with as many parameters"
        if not rivals
        else f"it is proved higher than that of {', '.join(each.method for each in proved)}"
        if proved
        else "no difference from another method is proved"
    )
    loss = f"its validation loss is {chosen.validation_loss.mean:.4f}"
    best = lowest(found.summaries)
    if best is not None and best is not chosen:
        loss += f", the lowest is that of {_what(best)}, {best.validation_loss.mean:.4f}"
    text = (
        f"On this data take {what}, because its score on {found.asked[0]} after {found.steps} "
        f"steps is {score}{against}; {standing}; {loss}."
    )
    return _Judged(text, True, undecided, open_)


def _score(summary: MethodSummary) -> float:
    return -1.0 if summary.score is None else summary.score.mean


def _score_lead(change: ScoreDifference | None, one: str, other: str) -> str:
    if change is None:
        return "no scored seed in common"
    return f"score of {one} minus that of {other}: {change.in_words()}"


def _standing(rivals: Sequence[tuple[str, Difference | None]]) -> str:
    """How the chosen method compares with the others at its budget."""
    proved = {other: change.loss for other, change in rivals if change and _is_above(change)}
    if not rivals:
        return "no other method was tried with as many"
    if not proved:
        return "that is the lowest mean here, and no difference from another method is proved"
    if len(proved) < len(rivals):
        return f"it is proved lower than that of {', '.join(proved)}"
    other = min(proved, key=lambda name: proved[name].mean)
    return (
        f"every other method's is higher, the next one's, that of {other}, by "
        f"{proved[other].mean:.4f} nats, {proved[other].interval()}"
    )


def _open_settings(
    found: Findings, chosen: MethodSummary, num_missing: int, *, by_score: bool
) -> Iterable[str]:
    """What about the chosen size, rate and trials is not known."""
    if num_missing:
        yield f"everything: at least {counted(num_missing, 'trial')} still to come"
    same_size = [each for each in found.summaries if each.budget == chosen.budget]
    if unequal_sizes(same_size):
        yield f"what equal sizes would show: parameters trained here are {_sizes(same_size)}"
    for each in found.summaries:
        if each.method == chosen.method and each.budget < chosen.budget and not by_score:
            change = found.difference(key_of(each), key_of(chosen))
            if not _is_above(change):
                fewer = f"{each.trainable_parameters:,}"
                told = _lead(change, fewer, f"{chosen.trainable_parameters:,}")
                yield f"whether {fewer} parameters would do as well ({told})"
    if chosen.is_edge:
        yield f"whether a rate beyond {chosen.learning_rate:g} is better: it is the last one tried"
    elif found.num_rates(key_of(chosen)) == 1:
        yield f"whether another rate is better: {chosen.learning_rate:g} is the only one tried"


def _is_above(change: Difference | None) -> bool:
    """Whether the whole interval lies above zero."""
    return change is not None and change.loss.low is not None and change.loss.low > 0


def _lead(change: Difference | None, one: str, other: str) -> str:
    """A difference, with the names of what was subtracted from what."""
    if change is None:
        return "no seed in common"
    loss = change.loss
    if is_kpsvd(other) and not is_kpsvd(one):
        # As in the tables: a KPSVD method minus a baseline.
        one, other, loss = other, one, loss.negated()
    return f"loss of {one} minus that of {other}: {loss.mean:+.4f} nats, {loss.interval()}"


def _sizes(summaries: Iterable[MethodSummary]) -> str:
    return ", ".join(f"{each.method} {each.trainable_parameters:,}" for each in summaries)


def _notes(found: Findings, num_missing: int, jobs: int) -> Iterable[str]:
    if num_missing:
        yield f"at least {counted(num_missing, 'trial')} still to come, so no claim is judged yet"
    for method in found.methods:
        if is_ours(method):
            yield f"{method} is this project's own code: PEFT has no such method"
    if jobs > 1:
        yield f"{jobs} trials ran at a time: seconds and costs are those of a shared machine"
    for budget in sorted({each.budget for each in found.summaries}):
        own = [each for each in found.summaries if each.budget == budget]
        if len({each.num_trials for each in own}) > 1:
            told = ", ".join(f"{each.method} {each.num_trials}" for each in own)
            yield f"unequal numbers of trials at {budget:,}: {told}"
        if unequal_sizes(own):
            yield f"unequal numbers of parameters at {budget:,}: {_sizes(own)}"
    for each in found.summaries:
        if each.is_edge:
            yield (
                f"{each.method} at {each.budget:,}: its best learning rate, "
                f"{each.learning_rate:g}, is at the edge of those tried; a better one may lie "
                "outside"
            )
    for row in found.rows:
        if row.failed:
            yield f"{row.trial}: {row.failed}"
    yield from _watched(found)
    yield from _binding(found)
    for each in found.summaries:
        loss = each.validation_loss.mean
        if found.base_loss is not None and loss > found.base_loss:
            yield (
                f"{each.method} at {each.budget:,} is worse than the base model at its best "
                f"learning rate, {each.learning_rate:g}: validation loss {loss:.4f}, the base "
                f"model's is {found.base_loss:.4f}; try lower rates"
            )


def _watched(found: Findings) -> Iterable[str]:
    """What looked wrong in trials: at the rates that were taken in words, elsewhere as a count."""
    for (method, budget), rows in found.best.items():
        for code in dict.fromkeys(code for row in rows for code in row.warnings):
            told = [row for row in rows if code in row.warnings]
            yield (
                f"{method} at {budget:,}, rate {rows[0].learning_rate:g}: {code} in "
                f"{len(told)} of {counted(len(rows), 'seed')}: {told[0].warnings[code]}"
            )
    taken = {row.trial for rows in found.best.values() for row in rows}
    others = [row for row in found.rows if row.trial not in taken]
    for code in dict.fromkeys(code for row in others for code in row.warnings):
        told = [row for row in others if code in row.warnings]
        names = some_of([f"{row.method} at {row.learning_rate:g}" for row in told], _LISTED)
        whole = counted(len(others), "trial")
        yield f"{code} in {len(told)} of {whole} at rates not taken: {names}"


def _binding(found: Findings) -> Iterable[str]:
    """What the reference loses where its parameters are cut: whether parameters matter at all."""
    budgets = found.budgets(found.reference)
    if len(budgets) < 2:
        return
    cut = found.difference((found.reference, budgets[0]), (found.reference, budgets[-1]))
    sizes = {key_of(each): each.trainable_parameters for each in found.summaries}
    few, many = (sizes[found.reference, budgets[place]] for place in (0, -1))
    # Budgets that end in the same size say nothing of parameters.
    if cut is None or few >= many:
        return
    gain = f"{found.reference} gains {cut.loss.mean:.4f} nats from {few:,} to {many:,} parameters"
    if cut.loss.low is None:
        yield f"{gain} on the one seed in common, which cannot tell whether the rank binds"
    elif cut.loss.low <= 0:
        # An interval that holds a real gain too says neither.
        is_shown = cut.loss.high is not None and cut.loss.high <= EQUAL_NATS
        told = (
            "the rank does not bind in these runs" if is_shown else "whether the rank binds is open"
        )
        yield (
            f"{told}: {gain} ({cut.loss.interval()}), so the "
            "loss-versus-parameters front says little; "
            f"{'lengthen the runs' if is_shown else 'take more seeds, or longer runs'}"
        )
