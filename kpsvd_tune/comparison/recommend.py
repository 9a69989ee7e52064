"""What a reader of a comparison should do on this data, and what the trials leave open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from kpsvd_tune.comparison.claims import EQUAL_SIZE
from kpsvd_tune.report.comparison import Difference, Estimate, MethodSummary, Recommendation

Key = tuple[str, int]


def recommend(
    summaries: Sequence[MethodSummary],
    difference: Callable[[Key, Key], Difference | None],
    base: Mapping[str, float | None],
    *,
    steps: int,
    num_missing: int = 0,
) -> Recommendation:
    """Name the method, size and rate with the lowest mean validation loss, and what is not proved.

    Only summaries with the most seeds are chosen from: few seeds may look lucky. What is better
    than what is decided by the paired differences' 95 % intervals, at the size that was chosen.

    Args:
        summaries: Every method at every budget, each at its best rate; at least one.
        difference: Gives the paired difference of two (method, budget), the first minus the second.
        base: Losses of the base model.
        steps: Optimiser steps of a trial.
        num_missing: Trials that are still to come.
    """
    most = max(each.validation_loss.n for each in summaries)
    chosen = min(
        (each for each in summaries if each.validation_loss.n == most),
        key=lambda each: each.validation_loss.mean,
    )
    loss, start = chosen.validation_loss.mean, base.get("validation_loss")
    what = (
        f"{chosen.method} at {chosen.learning_rate:g} with {chosen.trainable_parameters:,} "
        "trainable parameters"
    )
    rivals = [
        (each, difference((each.method, each.budget), (chosen.method, chosen.budget)))
        for each in summaries
        if each.budget == chosen.budget and each is not chosen
    ]
    if start is not None and loss >= start:
        return Recommendation(
            f"On this data take none of them: the best, {what}, has a validation loss of "
            f"{loss:.4f} after {steps} steps, and the base model has {start:.4f}.",
            tuple(_open_settings(summaries, difference, chosen, num_missing)),
        )
    against = "" if start is None else f", where the base model has {start:.4f}"
    test = (
        ""
        if chosen.test_loss is None
        else f" (test loss {chosen.test_loss.mean:.4f}, which no choice looked at)"
    )
    proved = [(other, found) for other, found in rivals if found and _is_above(found.loss)]
    undecided = [
        f"whether it is better than {other.method} ({_lead(found, other.method, chosen.method)})"
        for other, found in rivals
        if not (found and _is_above(found.loss))
    ]
    return Recommendation(
        f"On this data take {what}, because its validation loss after {steps} steps is "
        f"{loss:.4f}{test}{against}; {_standing(proved, rivals)}.",
        (*undecided, *_open_settings(summaries, difference, chosen, num_missing)),
    )


def _standing(
    proved: Sequence[tuple[MethodSummary, Difference]],
    rivals: Sequence[tuple[MethodSummary, Difference | None]],
) -> str:
    if not rivals:
        return "no other method was tried with as many"
    if not proved:
        return "that is the lowest mean here, and no difference from another method is proved"
    other, found = min(proved, key=lambda each: each[1].loss.mean)
    if len(proved) == len(rivals):
        start = "every other method's is higher, the next one's, that of"
        return f"{start} {other.method}, by {_shown(found, sign='')}"
    names = ", ".join(each.method for each, _ in proved)
    return f"it is proved lower than that of {names}"


def _open_settings(
    summaries: Sequence[MethodSummary],
    difference: Callable[[Key, Key], Difference | None],
    chosen: MethodSummary,
    num_missing: int,
) -> Iterable[str]:
    """What about the chosen size, rate and trials is not known."""
    if num_missing:
        yield f"everything: at least {num_missing} trials are still to come"
    same_size = [each for each in summaries if each.budget == chosen.budget]
    sizes = [each.trainable_parameters for each in same_size]
    if max(sizes) > (1 + EQUAL_SIZE) * min(sizes):
        told = ", ".join(f"{each.method} {each.trainable_parameters:,}" for each in same_size)
        yield f"what equal sizes would show: parameters trained here are {told}"
    for each in summaries:
        if each.method == chosen.method and each.budget < chosen.budget:
            found = difference((each.method, each.budget), (chosen.method, chosen.budget))
            if not (found and _is_above(found.loss)):
                fewer = f"{each.trainable_parameters:,}"
                more = f"{chosen.trainable_parameters:,}"
                yield f"whether {fewer} parameters would do as well ({_lead(found, fewer, more)})"
    if chosen.is_edge:
        yield f"whether a rate beyond {chosen.learning_rate:g} is better: it is the last one tried"


def _is_above(found: Estimate) -> bool:
    """Whether the whole interval lies above zero."""
    return found.low is not None and found.low > 0


def _lead(found: Difference | None, one: str, other: str) -> str:
    """A difference with whose loss minus whose it is."""
    told = _shown(found)
    return told if found is None else f"loss of {one} minus that of {other}: {told}"


def _shown(found: Difference | None, sign: str = "+") -> str:
    if found is None:
        return "no seed in common"
    loss = found.loss
    if loss.low is None or loss.high is None:
        return f"{loss.mean:{sign}.4f} nats, one seed"
    return f"{loss.mean:{sign}.4f} nats, 95 % interval {loss.low:+.4f} to {loss.high:+.4f}"
