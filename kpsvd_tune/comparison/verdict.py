"""From rows of trials to summaries, paired differences and notes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from kpsvd_tune.comparison.claims import EQUAL_SIZE, is_kpsvd, judge, lowest_mean
from kpsvd_tune.comparison.recommend import recommend
from kpsvd_tune.comparison.statistics import estimate, steps_to, variation
from kpsvd_tune.errors import InputError
from kpsvd_tune.report.comparison import Comparison, Difference, Estimate, MethodSummary, TrialRow


def compare_rows(
    rows: Sequence[TrialRow],
    *,
    model: str,
    steps: int,
    base: Mapping[str, float | None],
    num_warmup: int,
    max_grad_norm: float | None,
    price_per_hour: float | None = None,
    currency: str = "USD",
    num_missing: int = 0,
    jobs: int = 1,
) -> Comparison:
    """Draw the verdict.

    Each method is judged at each budget by its best learning rate: the lowest mean validation
    loss among the rates that were run with the most seeds there and failed on none. Test losses
    are reported for those and never looked at in a choice.

    Args:
        rows: The trials; at least one that did not fail.
        model: The base model.
        steps: Optimiser steps of a trial.
        base: Losses of the base model.
        num_warmup: Warm-up steps, left out of the gradients' variation.
        max_grad_norm: Where gradients were clipped; None: nowhere.
        price_per_hour: Of one device; None: no costs.
        currency: Of the price.
        num_missing: Trials that are still to come; with any, no claim is judged.
        jobs: Trials that ran at a time.

    Raises:
        InputError: No trial ended with a loss.
    """
    groups: dict[tuple[str, int], list[TrialRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.budget), []).append(row)
    best = {key: chosen for key, group in groups.items() if (chosen := best_rows(group))}
    if not best:
        raise InputError("no trial has ended with a loss yet: nothing can be compared")
    names = list(dict.fromkeys(method for method, _ in best))
    # Plain LoRA if it is there, else a variant of it, else any baseline.
    reference = min(names, key=lambda name: (name != "lora", name[:4] != "lora", is_kpsvd(name)))
    targets = {
        budget: lowest_mean(chosen)
        for (method, budget), chosen in best.items()
        if method == reference
    }
    summaries = tuple(
        _summary(
            chosen,
            groups[key],
            target=targets.get(key[1]),
            num_warmup=num_warmup,
            max_grad_norm=max_grad_norm,
            price_per_hour=price_per_hour,
        )
        for key, chosen in sorted(best.items(), key=lambda item: (item[0][1], item[0][0]))
    )
    others = [name for name in names if not is_kpsvd(name) or name == reference]
    differences = tuple(
        difference(best, (s.method, s.budget), (other, budget))
        for s in summaries
        for other in others
        for budget in sorted({b for m, b in best if m == other})
        if budget >= s.budget and (other, budget) != (s.method, s.budget)
    )
    found = tuple(each for each in differences if each is not None)
    own = [budget for name, budget in best if name == reference]
    # What the reference loses where its parameters are cut: whether parameters matter at all.
    cut = difference(best, (reference, min(own)), (reference, max(own))) if len(own) > 1 else None
    return Comparison(
        model=model,
        steps=steps,
        base=dict(base),
        recommendation=recommend(
            summaries,
            lambda one, other: difference(best, one, other),
            base,
            steps=steps,
            num_missing=num_missing,
        ),
        reference=reference,
        summaries=summaries,
        differences=found,
        claims=(
            ()
            if num_missing
            else judge(best, summaries, found, num_warmup, base.get("validation_loss"))
        ),
        notes=(
            *_notes(rows, summaries, reference, cut, num_missing, jobs),
            *_worse_than_base(summaries, base.get("validation_loss")),
        ),
        currency=currency,
    )


def best_rows(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The rows of the best learning rate, by seed; empty where every rate failed somewhere."""
    by_rate: dict[float, list[TrialRow]] = {}
    for row in rows:
        by_rate.setdefault(row.learning_rate, []).append(row)
    whole = [
        each for each in by_rate.values() if all(row.validation_loss is not None for row in each)
    ]
    if not whole:
        return []
    most = max(len(each) for each in whole)
    whole = [each for each in whole if len(each) == most]
    chosen = min(whole, key=lambda each: (statistics.fmean(_losses(each)), each[0].learning_rate))
    return sorted(chosen, key=lambda row: row.seed)


def difference(
    best: Mapping[tuple[str, int], Sequence[TrialRow]],
    one: tuple[str, int],
    other: tuple[str, int],
) -> Difference | None:
    """Paired by seed, which fixes the order of the rows; None without a seed in common."""
    paired = _paired(best[one], best[other])
    if not paired:
        return None
    changes = [_loss(a) - _loss(b) for a, b in paired]
    return Difference(*one, *other, estimate(changes))


def _summary(
    chosen: Sequence[TrialRow],
    group: Sequence[TrialRow],
    *,
    target: float | None,
    num_warmup: int,
    max_grad_norm: float | None,
    price_per_hour: float | None,
) -> MethodSummary:
    first = chosen[0]
    rates = sorted({row.learning_rate for row in group})
    seconds = statistics.median(row.seconds_per_step for row in chosen)
    init = statistics.median(row.init_seconds for row in chosen)
    reached = [None if target is None else steps_to(r.validation_losses, target) for r in chosen]
    steps = [each for each in reached if each is not None]
    norms = [norm for row in chosen for norm in row.grad_norms]
    limit = math.inf if max_grad_norm is None else max_grad_norm
    hours = (init + seconds * len(first.losses)) / 3600
    return MethodSummary(
        method=first.method,
        budget=first.budget,
        trainable_parameters=first.trainable_parameters,
        stored_parameters=first.stored_parameters,
        rank=first.rank,
        learning_rate=first.learning_rate,
        is_edge=len(rates) > 1 and first.learning_rate in (rates[0], rates[-1]),
        num_trials=len(group),
        validation_loss=estimate(_losses(chosen)),
        test_loss=_optional([row.test_loss for row in chosen]),
        steps_to_reference=estimate(steps) if steps else None,
        seconds_to_reference=statistics.fmean(steps) * seconds if steps else None,
        gradient_variation=estimate([variation(row.grad_norms, num_warmup) for row in chosen]),
        clipped_share=sum(norm > limit for norm in norms) / max(1, len(norms)),
        forgetting=_optional([row.forgetting for row in chosen]),
        seconds_per_step=seconds,
        init_seconds=init,
        peak_memory_bytes=max(row.peak_memory_bytes for row in chosen),
        cost=None if price_per_hour is None else hours * price_per_hour,
    )


def _notes(
    rows: Sequence[TrialRow],
    summaries: Sequence[MethodSummary],
    reference: str,
    cut: Difference | None,
    num_missing: int,
    jobs: int,
) -> Iterable[str]:
    if num_missing:
        yield f"at least {num_missing} trials are still to come, so no claim is judged yet"
    if jobs > 1:
        yield f"{jobs} trials ran at a time: seconds and costs are those of a shared machine"
    for budget in sorted({s.budget for s in summaries}):
        own = [s for s in summaries if s.budget == budget]
        counts = {s.method: s.num_trials for s in own}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            yield f"unequal numbers of trials at {budget:,}: {told}"
        trained = [s.trainable_parameters for s in own]
        if max(trained) > (1 + EQUAL_SIZE) * min(trained):
            told = ", ".join(f"{s.method} {s.trainable_parameters:,}" for s in own)
            yield f"unequal numbers of parameters at {budget:,}: {told}"
    for summary in summaries:
        if summary.is_edge:
            yield (
                f"{summary.method} at {summary.budget:,}: its best learning rate, "
                f"{summary.learning_rate:g}, is at the edge of those tried; a better one may lie "
                "outside"
            )
    for row in rows:
        if row.failed:
            yield (
                f"{row.method} at {row.budget:,}, rate {row.learning_rate:g}, seed {row.seed}: "
                f"{row.failed}"
            )
    if cut is not None and cut.loss.n == 1:
        yield (
            f"{reference} gains {cut.loss.mean:.4f} nats from {cut.budget:,} to "
            f"{cut.other_budget:,} parameters on the one seed in common, which cannot tell whether "
            "the rank binds"
        )
    elif cut is not None and cut.loss.low is not None and cut.loss.low <= 0:
        yield (
            f"the rank does not bind in these runs: {reference} gains {cut.loss.mean:.4f} nats "
            f"from {cut.budget:,} to {cut.other_budget:,} parameters{_interval(cut.loss)}, so the "
            "loss-versus-parameters front says little; lengthen the runs"
        )


def _worse_than_base(summaries: Sequence[MethodSummary], base_loss: float | None) -> Iterable[str]:
    for summary in summaries:
        loss = summary.validation_loss.mean
        if base_loss is not None and loss > base_loss:
            yield (
                f"{summary.method} at {summary.budget:,} is worse than the base model at its best "
                f"learning rate, {summary.learning_rate:g}: validation loss {loss:.4f}, the base "
                f"model's is {base_loss:.4f}; try lower rates"
            )


def _interval(found: Estimate) -> str:
    return f" (95 % interval {found.low:+.4f} to {found.high:+.4f}, n = {found.n})"


def _loss(row: TrialRow) -> float:
    assert row.validation_loss is not None
    return row.validation_loss


def _losses(rows: Sequence[TrialRow]) -> list[float]:
    return [_loss(row) for row in rows]


def _paired(one: Sequence[TrialRow], other: Sequence[TrialRow]) -> list[tuple[TrialRow, TrialRow]]:
    by_seed = {row.seed: row for row in other}
    return [(row, by_seed[row.seed]) for row in one if row.seed in by_seed]


def _optional(values: Sequence[float | None]) -> Estimate | None:
    known = [each for each in values if each is not None]
    return estimate(known) if known and len(known) == len(values) else None
