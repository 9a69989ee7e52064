"""The four claims about KPSVD, each held, not held or undecided by the trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kpsvd_tune.comparison.statistics import estimate, mean_curve, steps_to, variation
from kpsvd_tune.report.comparison import Claim, Difference, Estimate, MethodSummary, TrialRow

# Losses this close, in nats, count as equal quality: well below what one step on a usual grid of
# learning rates changes.
EQUAL_NATS = 0.005
# "Fewer parameters" starts at three quarters of the other method's, as the paper's figure does.
FEWER = 0.8
# Trained parameters that differ by more than this share are not equal.
EQUAL_SIZE = 0.02
# How a loss falls and how gradients vary is seen in runs of at least this many times the warm-up,
# and of at least this many steps.
WARMUPS, FEWEST_STEPS = 5, 20

Best = Mapping[tuple[str, int], Sequence[TrialRow]]


def judge(
    best: Best,
    summaries: Sequence[MethodSummary],
    differences: Sequence[Difference],
    num_warmup: int,
    base_loss: float | None = None,
) -> tuple[Claim, ...]:
    """Judge what can be judged: a KPSVD method and LoRA or PiSSA must be among the trials.

    A claim holds where the 95 % confidence interval of the paired difference lies on its side, does
    not hold where it lies on the other, and is undecided otherwise: zero inside, one seed, or
    trials that cannot show it. Those are methods of unequal sizes, a baseline that has learnt
    nothing, and for convergence and gradients runs that are short or mostly warm-up.

    KPSVD stands for its best variant, and so do the others: the one with the lowest mean
    validation loss among those with the most seeds at that budget. A variant chosen on the seeds
    it is then judged by looks a little better than it is, the more the more variants there were;
    their number is part of the figure.

    Args:
        best: (method, budget) to the rows of its best rate.
        summaries: Of the same.
        differences: Paired differences of validation losses.
        num_warmup: Warm-up steps.
        base_loss: Validation loss of the base model; None where it is not known.
    """
    pairs = [
        (ours, other)
        for budget in sorted({summary.budget for summary in summaries})
        if (ours := _ours(summaries, budget)) and (other := _others(summaries, budget))
    ]
    if not pairs:
        return ()
    _, largest = pairs[-1]
    most_seeds = max(pairs, key=lambda pair: (pair[0].validation_loss.n, pair[0].budget))
    return (
        _fewer(summaries, differences, largest, base_loss),
        _quality(summaries, differences, *most_seeds, base_loss),
        _faster(best, *most_seeds, num_warmup),
        _steadier(best, *most_seeds, num_warmup),
    )


def _fewer(
    summaries: Sequence[MethodSummary],
    differences: Sequence[Difference],
    other: MethodSummary,
    base_loss: float | None,
) -> Claim:
    text = (
        f"fewer parameters: at most {FEWER:.0%} of the best baseline's at no higher loss "
        f"(within {EQUAL_NATS} nats)"
    )
    limit = FEWER * other.trainable_parameters
    ours = _lowest(s for s in summaries if is_kpsvd(s.method) and s.trainable_parameters <= limit)
    if ours is None:
        return Claim(text, "undecided", "no KPSVD trial has that few parameters")
    found = _find(differences, ours, other)
    share = ours.trainable_parameters / other.trainable_parameters
    figure = (
        f"{ours.method} with {share:.0%} of the parameters of {other.method} "
        f"({other.trainable_parameters:,}): {_shown(found)}"
    )
    verdict = _verdict(found, EQUAL_NATS)
    if verdict == "held":
        # A rank that is no bottleneck can be cut in any method.
        cut = _lowest(
            s
            for s in summaries
            if not is_kpsvd(s.method) and s.trainable_parameters <= 1.05 * ours.trainable_parameters
        )
        own = None if cut is None else _find(differences, cut, other)
        if cut is None:
            verdict = "undecided"
            figure += "; no baseline was run with that few, to show that parameters matter"
        elif _verdict(own, EQUAL_NATS) != "not held":
            verdict = "undecided"
            figure += (
                f"; but {cut.method} with {cut.trainable_parameters:,} is no worse either "
                f"({_shown(own)}): the rank does not bind"
            )
    return _claim(text, verdict, figure, _learnt_nothing(other, base_loss))


def _quality(
    summaries: Sequence[MethodSummary],
    differences: Sequence[Difference],
    ours: MethodSummary,
    other: MethodSummary,
    base_loss: float | None,
) -> Claim:
    text = f"equal or better quality at equal parameters (within {EQUAL_NATS} nats)"
    found = _find(differences, ours, other)
    variants = sum(is_kpsvd(s.method) and s.budget == ours.budget for s in summaries)
    among = f", the best of {variants} variants" if variants > 1 else ""
    figure = f"{ours.method}{among}, against {other.method} at {ours.budget:,}: {_shown(found)}"
    return _claim(
        text,
        _verdict(found, EQUAL_NATS),
        figure,
        _unequal(ours, other),
        _learnt_nothing(other, base_loss),
    )


def lowest_mean(rows: Sequence[TrialRow]) -> float:
    """The lowest point of the mean validation curve over seeds."""
    return min(loss for _, loss in mean_curve([row.validation_losses for row in rows]))


def _faster(best: Best, ours: MethodSummary, other: MethodSummary, num_warmup: int) -> Claim:
    text = "faster convergence: fewer steps to the best baseline's lowest validation loss"
    goal = lowest_mean(best[other.method, other.budget])
    # A run that never gets there took at least all its steps; with such runs the mean is a bound.
    changes, num_short = [], 0
    for own, theirs in _pairs(best, ours, other):
        steps = [steps_to(row.validation_losses, goal) for row in (own, theirs)]
        num_short += steps[0] is None
        own_steps, their_steps = (
            float(len(row.losses)) if each is None else each
            for each, row in zip(steps, (own, theirs), strict=True)
        )
        changes.append(own_steps - their_steps)
    if not changes:
        return Claim(text, "undecided", "no seed in common")
    found = estimate(changes)
    note = f"; {num_short} of {len(changes)} KPSVD runs never reach it" if num_short else ""
    figure = (
        f"{ours.method} against {other.method} at {ours.budget:,}, loss {goal:.4f}: "
        f"{found.mean:+.1f} steps{_interval(found, 1)}{note}"
    )
    verdict = _verdict(found, 0.0)
    if verdict == "held" and num_short:
        verdict = "undecided"
    return _claim(
        text, verdict, figure, _unequal(ours, other), _short(best, ours, other, num_warmup)
    )


def _steadier(best: Best, ours: MethodSummary, other: MethodSummary, num_warmup: int) -> Claim:
    text = "steadier gradients: lower variation of the gradient norm after warm-up"
    pairs = _pairs(best, ours, other)
    if any(len(row.grad_norms) < num_warmup + 2 for pair in pairs for row in pair):
        return Claim(text, "undecided", "too few steps after warm-up")
    changes = [
        variation(own.grad_norms, num_warmup) - variation(theirs.grad_norms, num_warmup)
        for own, theirs in pairs
    ]
    if not changes:
        return Claim(text, "undecided", "no seed in common")
    found = estimate(changes)
    figure = (
        f"{ours.method} {ours.gradient_variation.mean:.3f}, {other.method} "
        f"{other.gradient_variation.mean:.3f} at {ours.budget:,}: {found.mean:+.3f}"
        f"{_interval(found, 3)}; clipped steps {ours.clipped_share:.0%} and "
        f"{other.clipped_share:.0%}"
    )
    return _claim(
        text,
        _verdict(found, 0.0),
        figure,
        _unequal(ours, other),
        _short(best, ours, other, num_warmup),
    )


def _claim(text: str, verdict: str, figure: str, *doubts: str | None) -> Claim:
    """A claim that is undecided where there is a doubt, whatever the figures say."""
    found = [doubt for doubt in doubts if doubt is not None]
    if not found:
        return Claim(text, verdict, figure)
    return Claim(text, "undecided", f"{figure}; {'; '.join(found)}")


def _unequal(ours: MethodSummary, other: MethodSummary) -> str | None:
    sizes = ours.trainable_parameters, other.trainable_parameters
    if max(sizes) <= (1 + EQUAL_SIZE) * min(sizes):
        return None
    return (
        f"sizes differ by more than {EQUAL_SIZE:.0%}: it trains {sizes[0]:,} parameters where the "
        f"other trains {sizes[1]:,}"
    )


def _short(best: Best, ours: MethodSummary, other: MethodSummary, num_warmup: int) -> str | None:
    steps = min(len(row.losses) for pair in _pairs(best, ours, other) for row in pair)
    needed = max(WARMUPS * num_warmup, FEWEST_STEPS)
    if steps >= needed:
        return None
    return (
        f"runs of {steps} steps, {num_warmup} of them warm-up, are too short to tell: it takes "
        f"{needed} or more ({WARMUPS} times the warm-up, and at least {FEWEST_STEPS})"
    )


def _learnt_nothing(other: MethodSummary, base_loss: float | None) -> str | None:
    """Where the baseline learnt nothing, being as good says nothing."""
    gain = None if base_loss is None else base_loss - other.validation_loss.mean
    if gain is None or gain > EQUAL_NATS:
        return None
    return (
        f"{other.method} has learnt nothing (validation loss {other.validation_loss.mean:.4f}, the "
        f"base model's is {base_loss:.4f}), so being as good says nothing"
    )


def _verdict(found: Estimate | None, margin: float) -> str:
    """Of a difference that should not be above ``margin``; without one it must be below zero."""
    if found is None or found.low is None or found.high is None:
        return "undecided"
    if found.high < margin or found.high == margin > 0:
        return "held"
    return "not held" if found.low > margin else "undecided"


def is_kpsvd(method: str) -> bool:
    """Whether a method's name is one of ours."""
    return method.startswith("kpsvd")


def _ours(summaries: Sequence[MethodSummary], budget: int) -> MethodSummary | None:
    return _lowest(s for s in summaries if s.budget == budget and is_kpsvd(s.method))


def _others(summaries: Sequence[MethodSummary], budget: int) -> MethodSummary | None:
    return _lowest(s for s in summaries if s.budget == budget and not is_kpsvd(s.method))


def _lowest(summaries: Iterable[MethodSummary]) -> MethodSummary | None:
    # Few seeds may look lucky: those with the most come first.
    found = list(summaries)
    most = max((s.validation_loss.n for s in found), default=0)
    return min(
        (s for s in found if s.validation_loss.n == most),
        key=lambda s: s.validation_loss.mean,
        default=None,
    )


def _find(
    differences: Sequence[Difference], ours: MethodSummary, other: MethodSummary
) -> Estimate | None:
    wanted = (ours.method, ours.budget, other.method, other.budget)
    return next(
        (d.loss for d in differences if (d.method, d.budget, d.other, d.other_budget) == wanted),
        None,
    )


def _pairs(
    best: Best, ours: MethodSummary, other: MethodSummary
) -> list[tuple[TrialRow, TrialRow]]:
    theirs = {row.seed: row for row in best[other.method, other.budget]}
    own = best[ours.method, ours.budget]
    return [(row, theirs[row.seed]) for row in own if row.seed in theirs]


def _shown(found: Estimate | None) -> str:
    if found is None:
        return "no seed in common"
    return f"{found.mean:+.4f} nats{_interval(found, 4)}"


def _interval(found: Estimate, digits: int) -> str:
    if found.low is None or found.high is None:
        return " (one seed)"
    return f" (95 % interval {found.low:+.{digits}f} to {found.high:+.{digits}f}, n = {found.n})"
