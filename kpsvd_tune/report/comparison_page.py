"""A comparison as an HTML page, `templates/comparison.html.j2` filled in."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kpsvd_tune.report.comparison import Comparison, MethodSummary, TrialRow
from kpsvd_tune.report.figures import DASHES, PALETTES, Style, Trace, figure
from kpsvd_tune.report.pages import render
from kpsvd_tune.units import counted

# Steps of the moving median of gradient norms: one batch's outlier should not hide the rest.
SMOOTH_STEPS = 5
# Of all that is said of a method, the first that its table of costs says and the other does not.
FIRST_COST = "steps to reference"


def comparison_page(verdict: Comparison, rows: Sequence[TrialRow]) -> str:
    """Render a verdict and the trials it was drawn from as a page with four figures and tables.

    Raises:
        InputError: plotly is not installed.
    """
    cells = [summary.in_words(verdict.currency) for summary in verdict.summaries]
    titles = [title for title in cells[0] if title != "score" or verdict.task is not None]
    bought = [each.in_words(verdict.currency) for each in verdict.returns]
    costs = titles.index(FIRST_COST)
    most = max(s.validation_loss.n for s in verdict.summaries)
    budget = max(s.budget for s in verdict.summaries if s.validation_loss.n == most)
    return render(
        "comparison",
        "the page of a comparison",
        {"figures": _figures(verdict, rows, budget), "palettes": PALETTES},
        model=verdict.model,
        at=f"at {budget:,} parameters",
        subtitle=(
            f"{counted(verdict.steps, 'step')} a trial, {counted(len(rows), 'trial')}; the "
            "reference is "
            f"{verdict.reference}; bands span the seeds, bars are one standard deviation, "
            "intervals are 95 %."
        ),
        advice=verdict.recommendation,
        claims=verdict.claims,
        tables=(
            ("quality", "Quality of every method at its best learning rate", titles[:costs]),
            ("cost", "Speed and cost of the same", [*titles[:2], *titles[costs:]]),
        ),
        cells=cells,
        bought=bought,
        bought_titles=[
            title
            for title in (bought[0] if bought else ())
            if {row[title] for row in bought} != {"–"}
        ],
        sentences=_sentences(verdict),
        score_differences=verdict.score_differences,
        differences=verdict.differences,
        notes=verdict.notes,
    )


def _sentences(verdict: Comparison) -> list[str]:
    """What is said below the table of what the money bought."""
    found = [] if verdict.smallest is None else [verdict.smallest.in_words()]
    if verdict.spent is not None:
        found.append(f"spent: {verdict.spent.in_words(verdict.currency)}")
    if verdict.task is not None and verdict.base_score is not None:
        found.append(
            f"scores are of {verdict.task}; the base model has {100 * verdict.base_score:.1f} %"
        )
    return [f"{each[0].upper()}{each[1:]}." for each in found]


def _figures(verdict: Comparison, rows: Sequence[TrialRow], budget: int) -> dict[str, Any]:
    """Traces and axis titles of each figure, as plotly.js takes them."""
    curves, front, rates, norms = [], [], [], []
    later: list[tuple[int, float]] = []
    for place, method in enumerate(dict.fromkeys(s.method for s in verdict.summaries)):
        dash = DASHES[place // len(PALETTES["light"]) % len(DASHES)]
        style = Style(method, place, dash)
        own = [s for s in verdict.summaries if s.method == method]
        front.append(_front(own, style))
        rates += _rates([r for r in rows if (r.method, r.budget) == (method, budget)], style)
        for rate in (s.learning_rate for s in own if s.budget == budget):
            chosen = [
                r for r in rows if (r.method, r.budget, r.learning_rate) == (method, budget, rate)
            ]
            steps = [step for step, _ in chosen[0].validation_losses]
            curves += _band(
                steps, [[loss for _, loss in r.validation_losses] for r in chosen], style
            )
            smooth = [_moving_median(r.grad_norms) for r in chosen]
            norms += _band(list(range(1, len(smooth[0]) + 1)), smooth, style)
            later += [point for r in chosen for point in r.validation_losses[1:]]
    whole = figure(curves, "step", "validation loss")
    return {
        "curves": {**whole, "later": _later(whole, later)},
        "front": figure(front, "trainable parameters", "validation loss", x_type="log"),
        "rates": figure(rates, "learning rate", "validation loss", x_type="log"),
        "norms": figure(norms, "step", "gradient norm", y_type="log"),
    }


def _later(whole: Mapping[str, Any], later: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """The axes without step 0, whose loss flattens what comes after it."""
    if not later:
        return {"x": whole["x"], "y": whole["y"]}
    steps, losses = [step for step, _ in later], [loss for _, loss in later]
    margin = 0.05 * (max(losses) - min(losses)) or 0.01
    return {
        "x": {**whole["x"], "range": [min(steps), max(max(steps), min(steps) + 1)]},
        "y": {**whole["y"], "range": [min(losses) - margin, max(losses) + margin]},
    }


def _band(xs: list[int], seeds: Sequence[Sequence[float]], style: Style) -> list[Trace]:
    """The mean over seeds as a line, and from the lowest to the highest seed as a band."""
    columns = list(zip(*seeds, strict=False))
    xs = xs[: len(columns)]
    line = style.line(xs, [statistics.fmean(each) for each in columns])
    if len(seeds) == 1:
        return [line]
    low, high = [min(each) for each in columns], [max(each) for each in columns]
    shape = {"fill": "toself", "mode": "lines", "opacity": 0.18, "line": {"width": 0}}
    return [style.behind([*xs, *reversed(xs)], [*high, *reversed(low)], **shape), line]


def _front(summaries: Sequence[MethodSummary], style: Style) -> Trace:
    bars = [s.validation_loss.deviation or 0.0 for s in summaries]
    return style.line(
        [s.trainable_parameters for s in summaries],
        [s.validation_loss.mean for s in summaries],
        error_y={"array": bars, "thickness": 1},
        mode="lines+markers",
        marker={"size": 7},
    )


def _rates(rows: Sequence[TrialRow], style: Style) -> list[Trace]:
    """The mean at every rate as a line, every trial as a dot."""
    own: dict[float, list[float]] = {}
    for row in rows:
        if row.validation_loss is not None:
            own.setdefault(row.learning_rate, []).append(row.validation_loss)
    rates = sorted(own)
    dots = [(rate, loss) for rate in rates for loss in own[rate]]
    xs, ys = [rate for rate, _ in dots], [loss for _, loss in dots]
    return [
        style.line(rates, [statistics.fmean(own[rate]) for rate in rates]),
        style.behind(xs, ys, mode="markers", marker={"size": 7}),
    ]


def _moving_median(values: Sequence[float]) -> list[float]:
    half = SMOOTH_STEPS // 2
    return [
        statistics.median(values[max(0, place - half) : place + half + 1])
        for place in range(len(values))
    ]
