"""The four claims about KPSVD, each held, not held or undecided by the trials."""

from __future__ import annotations

from kpsvd_tune.comparison.findings import Findings, is_kpsvd, key_of, lowest
from kpsvd_tune.comparison.statistics import estimate, steps_to, variation
from kpsvd_tune.report.comparison import Claim, Difference, Estimate, MethodSummary
from kpsvd_tune.units import counted

# Losses this close, in nats, count as equal quality: well below what one step on a usual grid of
# learning rates changes.
EQUAL_NATS = 0.005
# "Fewer parameters" means at most this share of the other method's; the paper's is three quarters.
FEWER = 0.8
# Trained parameters that differ by more than this share are not equal.
EQUAL_SIZE = 0.02
# How a loss falls and how gradients vary is seen in runs of at least this many times the warm-up,
# and of at least this many steps.
WARMUPS, FEWEST_STEPS = 5, 20


def judge(found: Findings) -> tuple[Claim, ...]:
    """Judge what can be judged: a KPSVD method and LoRA or PiSSA must be among the trials.

    A claim holds where the 95 % confidence interval of the paired difference lies on its side, does
    not hold where it lies on the other, and is undecided otherwise: zero inside, one seed, or
    trials that cannot show it. Those are methods of unequal sizes, a baseline that has learnt
    nothing, and for convergence and gradients runs that are short or mostly warm-up.

    KPSVD is represented by its best variant, and so are the others: the one with the lowest mean
    validation loss among those with the most seeds at that budget. A variant that was chosen on the
    seeds it is then judged by looks a little better than it is, the more the more variants there
    were; their number is part of the figure.
    """
    pairs = []
    for budget in sorted({summary.budget for summary in found.summaries}):
        same = [summary for summary in found.summaries if summary.budget == budget]
        ours = lowest(each for each in same if is_kpsvd(each.method))
        other = lowest(each for each in same if not is_kpsvd(each.method))
        if ours and other:
            pairs.append((ours, other))
    if not pairs:
        return ()
    most_seeds = max(pairs, key=lambda pair: (pair[0].validation_loss.n, pair[0].budget))
    return (
        _fewer(found, pairs[-1][1]),
        _quality(found, *most_seeds),
        _faster(found, *most_seeds),
        _steadier(found, *most_seeds),
    )


def unequal_sizes(summaries: list[MethodSummary]) -> bool:
    """Whether they train numbers of parameters that are not equal."""
    sizes = [each.trainable_parameters for each in summaries]
    return max(sizes) > (1 + EQUAL_SIZE) * min(sizes)


def _fewer(found: Findings, other: MethodSummary) -> Claim:
    text = (
        f"fewer parameters: at most {FEWER:.0%} of the best baseline's at no higher loss "
        f"(within {EQUAL_NATS} nats)"
    )
    limit = FEWER * other.trainable_parameters
    ours = lowest(
        each
        for each in found.summaries
        if is_kpsvd(each.method) and each.trainable_parameters <= limit
    )
    if ours is None:
        return _undecidable(text, "no KPSVD trial has that few parameters")
    change = found.difference(key_of(ours), key_of(other))
    share = ours.trainable_parameters / other.trainable_parameters
    figure = (
        f"{ours.method} with {share:.0%} of the parameters of {other.method} "
        f"({other.trainable_parameters:,}): {_shown(change)}"
    )
    verdict = _verdict(change, EQUAL_NATS)
    if verdict == "held":
        # Where the rank limits no method, any method can be cut to fewer parameters.
        limit = 1.05 * ours.trainable_parameters
        cut = lowest(
            each
            for each in found.summaries
            if not is_kpsvd(each.method) and each.trainable_parameters <= limit
        )
        own = None if cut is None else found.difference(key_of(cut), key_of(other))
        if cut is None:
            verdict = "undecided"
            figure += "; no baseline was run with that few, to show that parameters matter"
        elif (cut_verdict := _verdict(own, EQUAL_NATS)) != "not held":
            verdict = "undecided"
            told = (
                "is no worse either: the rank does not bind"
                if cut_verdict == "held"
                else "is not shown to be worse, so that whether the rank binds is open"
            )
            figure += f"; but {cut.method} with {cut.trainable_parameters:,} {told} ({_shown(own)})"
    return _claim(text, verdict, figure, change, _learnt_nothing(other, found))


def _quality(found: Findings, ours: MethodSummary, other: MethodSummary) -> Claim:
    text = f"equal or better quality at equal parameters (within {EQUAL_NATS} nats)"
    change = found.difference(key_of(ours), key_of(other))
    variants = sum(is_kpsvd(s.method) and s.budget == ours.budget for s in found.summaries)
    among = f", the best of {variants} variants" if variants > 1 else ""
    figure = f"{ours.method}{among}, against {other.method} at {ours.budget:,}: {_shown(change)}"
    verdict = _verdict(change, EQUAL_NATS)
    doubts = _unequal(ours, other), _learnt_nothing(other, found)
    return _claim(text, verdict, figure, change, *doubts)


def _faster(found: Findings, ours: MethodSummary, other: MethodSummary) -> Claim:
    text = "faster convergence: fewer steps to the best baseline's lowest validation loss"
    goal = found.lowest_mean(key_of(other))
    # A run that never gets there took at least all its steps; with such runs the mean is a bound.
    changes, num_short, num_other_short = [], 0, 0
    for own, theirs in found.pairs(key_of(ours), key_of(other)):
        steps = [steps_to(row.validation_losses, goal) for row in (own, theirs)]
        num_short += steps[0] is None
        num_other_short += steps[1] is None
        own_steps, their_steps = (
            float(len(row.losses)) if each is None else each
            for each, row in zip(steps, (own, theirs), strict=True)
        )
        changes.append(own_steps - their_steps)
    if not changes:
        return _undecidable(text, "no seed in common")
    change = estimate(changes)
    note = f"; {num_short} of {len(changes)} KPSVD runs never reach it" if num_short else ""
    if num_other_short:
        note += f"; {num_other_short} of {len(changes)} of the baseline's never reach it"
    figure = (
        f"{ours.method} against {other.method} at {ours.budget:,}, loss {goal:.4f}: "
        f"{change.mean:+.1f} steps ({change.interval(1)}){note}"
    )
    verdict = _verdict(change, 0.0)
    # A bound of one side only counts against that side's lead.
    if (verdict == "held" and num_short) or (verdict == "not held" and num_other_short):
        verdict = "undecided"
    few, sizes = _short(found, ours, other), _unequal(ours, other)
    return _claim(text, verdict, figure, change, sizes, few_steps=few)


def _steadier(found: Findings, ours: MethodSummary, other: MethodSummary) -> Claim:
    text = "steadier gradients: lower variation of the gradient norm after warm-up"
    pairs, num_warmup = found.pairs(key_of(ours), key_of(other)), found.num_warmup
    if any(len(row.grad_norms) < num_warmup + 2 for pair in pairs for row in pair):
        return _undecidable(text, "too few steps after warm-up")
    changes = [
        variation(own.grad_norms, num_warmup) - variation(theirs.grad_norms, num_warmup)
        for own, theirs in pairs
    ]
    if not changes:
        return _undecidable(text, "no seed in common")
    change = estimate(changes)
    figure = (
        f"{ours.method} {ours.gradient_variation.mean:.3f}, {other.method} "
        f"{other.gradient_variation.mean:.3f} at {ours.budget:,}: {change.mean:+.3f} "
        f"({change.interval(3)}); clipped steps {ours.clipped_share:.0%} and "
        f"{other.clipped_share:.0%}"
    )
    few, sizes = _short(found, ours, other), _unequal(ours, other)
    return _claim(text, _verdict(change, 0.0), figure, change, sizes, few_steps=few)


def _claim(
    text: str,
    verdict: str,
    figure: str,
    change: Difference | Estimate | None,
    *doubts: str | None,
    few_steps: str | None = None,
) -> Claim:
    """A claim that is undecided where there is a doubt, whatever the figures say."""
    told = [doubt for doubt in (*doubts, few_steps) if doubt is not None]
    found = change.loss if isinstance(change, Difference) else change
    seeds = (
        "no seed in common"
        if found is None
        else "one seed, which cannot tell a difference from chance"
        if found.low is None
        else None
    )
    undecidable = tuple(each for each in (seeds, few_steps) if each is not None)
    return Claim(text, "undecided" if told else verdict, "; ".join((figure, *told)), undecidable)


def _undecidable(text: str, why: str) -> Claim:
    return Claim(text, "undecided", why, (why,))


def _unequal(ours: MethodSummary, other: MethodSummary) -> str | None:
    if not unequal_sizes([ours, other]):
        return None
    return (
        f"sizes differ by more than {EQUAL_SIZE:.0%}: it trains {ours.trainable_parameters:,} "
        f"parameters where the other trains {other.trainable_parameters:,}"
    )


def _short(found: Findings, ours: MethodSummary, other: MethodSummary) -> str | None:
    pairs, num_warmup = found.pairs(key_of(ours), key_of(other)), found.num_warmup
    steps = min(len(row.losses) for pair in pairs for row in pair)
    needed = max(WARMUPS * num_warmup, FEWEST_STEPS)
    if steps >= needed:
        return None
    return (
        f"runs of {counted(steps, 'step')}, {num_warmup} of them warm-up, are too short to "
        "tell: it takes "
        f"{needed} or more ({WARMUPS} times the warm-up, and at least {FEWEST_STEPS})"
    )


def _learnt_nothing(other: MethodSummary, found: Findings) -> str | None:
    """Where the baseline learnt nothing, being as good says nothing."""
    base, loss = found.base_loss, other.validation_loss.mean
    if base is None or base - loss > EQUAL_NATS:
        return None
    return (
        f"{other.method} has learnt nothing (validation loss {loss:.4f}, the base model's is "
        f"{base:.4f}), so being as good says nothing"
    )


def _verdict(change: Difference | Estimate | None, margin: float) -> str:
    """Of a difference that should not be above ``margin``; with margin 0 it must be below zero."""
    found = change.loss if isinstance(change, Difference) else change
    if found is None or found.low is None or found.high is None:
        return "undecided"
    if found.high < margin or found.high == margin > 0:
        return "held"
    return "not held" if found.low > margin else "undecided"


def _shown(change: Difference | None) -> str:
    if change is None:
        return "no seed in common"
    return f"{change.loss.mean:+.4f} nats ({change.loss.interval()})"
