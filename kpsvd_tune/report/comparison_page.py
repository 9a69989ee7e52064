"""A comparison as an HTML page, `templates/comparison.html.j2` filled in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from kpsvd_tune.report.comparison import Comparison, MethodSummary, TrialRow
from kpsvd_tune.report.pages import render
from kpsvd_tune.report.trials import interval, plus_minus, steps_reached
from kpsvd_tune.units import duration, size

# Hues of Okabe and Ito, which colour-blind readers tell apart, as light or dark as each background
# asks for.
PALETTES = {
    "light": (
        *("#0072b2", "#d55e00", "#00875f", "#b8528f"),
        *("#96760a", "#2f8fc9", "#7d55a8", "#6b6b6b"),
    ),
    "dark": (
        *("#4db3ff", "#ff8b4d", "#2fd6a3", "#f0a0cc"),
        *("#f2c037", "#a9dcff", "#c3a3f0", "#b5b5b5"),
    ),
}
# The ninth method and those after it share colours and differ in this.
DASHES = ("solid", "dash", "dot")
# Steps of the moving median of gradient norms: one batch's outlier should not hide the rest.
SMOOTH_STEPS = 5
QUALITY_COLUMNS = (
    *("method", "budget", "trained", "stored", "rank", "rate", "trials", "validation loss"),
    *("test loss", "forgetting"),
)
COST_COLUMNS = (
    *("method", "budget", "steps to reference", "time to it", "time a step", "start"),
    *("peak memory", "cost", "gradient CV", "clipped"),
)


@dataclass(frozen=True)
class Style:
    """How the traces of a method look: the place of their colour, and their dashes."""

    colour: int
    dash: str

    def trace(self, **parts: Any) -> dict[str, Any]:
        """A trace in this style."""
        return {"meta": {"colour": self.colour}, **parts}

    def line(self) -> dict[str, Any]:
        """Its line; the page adds the colour of the theme."""
        return {"dash": self.dash, "width": 2}


def comparison_page(verdict: Comparison, rows: Sequence[TrialRow]) -> str:
    """Render a comparison as a page with what it recommends, its claims, four figures and tables.

    Args:
        verdict: The verdict.
        rows: The trials it was drawn from.

    Returns:
        A whole HTML document of about 2 MB, nearly all of it plotly.js.

    Raises:
        InputError: If plotly is not installed.
    """
    methods = list(dict.fromkeys(summary.method for summary in verdict.summaries))
    most = max(s.validation_loss.n for s in verdict.summaries)
    budget = max(s.budget for s in verdict.summaries if s.validation_loss.n == most)
    styles = {
        name: Style(place, DASHES[place // len(PALETTES["light"]) % len(DASHES)])
        for place, name in enumerate(methods)
    }
    return render(
        "comparison",
        "the page of a comparison",
        {"figures": _figures(verdict, rows, budget, styles), "palettes": PALETTES},
        model=verdict.model,
        at=f"at {budget:,} parameters",
        subtitle=(
            f"{verdict.steps} steps a trial, {len(rows)} trials; the reference is "
            f"{verdict.reference}; bands span the seeds, bars are one standard deviation, "
            "intervals are 95 %."
        ),
        advice=verdict.recommendation,
        claims=verdict.claims,
        tables=(
            ("quality", "Quality of every method at its best learning rate", _quality(verdict)),
            ("cost", "Speed and cost of the same", _cost(verdict)),
        ),
        differences=[
            (each, f"{each.loss.mean:+.4f}{interval(each.loss)}") for each in verdict.differences
        ],
        notes=verdict.notes,
    )


def _figures(
    verdict: Comparison, rows: Sequence[TrialRow], budget: int, styles: Mapping[str, Style]
) -> dict[str, Any]:
    """Traces and axis titles of each figure, as plotly.js takes them."""
    shown = [s for s in verdict.summaries if s.budget == budget]
    chosen = {s.method: _chosen(s, rows) for s in shown}
    curves, norms = [], []
    for method, own in chosen.items():
        steps = [step for step, _ in own[0].validation_losses]
        losses = [[loss for _, loss in row.validation_losses] for row in own]
        curves += _band(method, steps, losses, styles[method])
        smooth = [_moving_median(row.grad_norms) for row in own]
        norms += _band(method, list(range(1, len(smooth[0]) + 1)), smooth, styles[method])
    whole = _figure(curves, "step", "validation loss")
    return {
        "curves": {**whole, "later": _later(whole, chosen)},
        "front": _figure(
            [
                _front(m, [s for s in verdict.summaries if s.method == m], c)
                for m, c in styles.items()
            ],
            "trainable parameters",
            "validation loss",
            x_type="log",
        ),
        "rates": _figure(
            [trace for m, c in styles.items() for trace in _rates(m, rows, budget, c)],
            "learning rate",
            "validation loss",
            x_type="log",
        ),
        "norms": _figure(norms, "step", "gradient norm", y_type="log"),
    }


def _later(whole: Mapping[str, Any], chosen: Mapping[str, Sequence[TrialRow]]) -> dict[str, Any]:
    """The axes without step 0, whose loss flattens what comes after it."""
    later = [point for own in chosen.values() for r in own for point in r.validation_losses[1:]]
    if not later:
        return {"x": whole["x"], "y": whole["y"]}
    steps, losses = [step for step, _ in later], [loss for _, loss in later]
    margin = 0.05 * (max(losses) - min(losses)) or 0.01
    return {
        "x": {**whole["x"], "range": [min(steps), max(max(steps), min(steps) + 1)]},
        "y": {**whole["y"], "range": [min(losses) - margin, max(losses) + margin]},
    }


def _chosen(summary: MethodSummary, rows: Sequence[TrialRow]) -> list[TrialRow]:
    return [
        row
        for row in rows
        if (row.method, row.budget, row.learning_rate)
        == (summary.method, summary.budget, summary.learning_rate)
    ]


def _band(
    name: str, xs: list[int], seeds: Sequence[Sequence[float]], style: Style
) -> list[dict[str, Any]]:
    """The mean over seeds as a line, and from the lowest to the highest seed as a band."""
    columns = list(zip(*seeds, strict=False))
    xs = xs[: len(columns)]
    low, high = [min(each) for each in columns], [max(each) for each in columns]
    line = style.trace(
        x=xs,
        y=[statistics.fmean(each) for each in columns],
        name=escape(name),
        legendgroup=name,
        mode="lines",
        line=style.line(),
    )
    if len(seeds) == 1:
        return [line]
    band = style.trace(
        x=[*xs, *reversed(xs)],
        y=[*high, *reversed(low)],
        fill="toself",
        mode="lines",
        opacity=0.18,
        line={"width": 0},
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )
    return [band, line]


def _front(method: str, summaries: Sequence[MethodSummary], style: Style) -> dict[str, Any]:
    return style.trace(
        x=[s.trainable_parameters for s in summaries],
        y=[s.validation_loss.mean for s in summaries],
        error_y={
            "array": [s.validation_loss.deviation or 0.0 for s in summaries],
            "thickness": 1,
        },
        name=escape(method),
        mode="lines+markers",
        line=style.line(),
        marker={"size": 7},
    )


def _rates(
    method: str, rows: Sequence[TrialRow], budget: int, style: Style
) -> list[dict[str, Any]]:
    """The mean at every rate as a line, every trial as a dot."""
    own: dict[float, list[float]] = {}
    for row in rows:
        if (row.method, row.budget) == (method, budget) and row.validation_loss is not None:
            own.setdefault(row.learning_rate, []).append(row.validation_loss)
    rates = sorted(own)
    dots = [(rate, loss) for rate in rates for loss in own[rate]]
    return [
        style.trace(
            x=rates,
            y=[statistics.fmean(own[rate]) for rate in rates],
            name=escape(method),
            legendgroup=method,
            mode="lines",
            line=style.line(),
        ),
        style.trace(
            x=[rate for rate, _ in dots],
            y=[loss for _, loss in dots],
            mode="markers",
            marker={"size": 7},
            legendgroup=method,
            showlegend=False,
            hoverinfo="skip",
        ),
    ]


def _figure(
    traces: list[dict[str, Any]],
    x_title: str,
    y_title: str,
    *,
    x_type: str = "linear",
    y_type: str = "linear",
) -> dict[str, Any]:
    return {
        "traces": traces,
        "x": {"title": {"text": x_title}, "type": x_type},
        "y": {"title": {"text": y_title}, "type": y_type},
    }


def _moving_median(values: Sequence[float]) -> list[float]:
    half = SMOOTH_STEPS // 2
    return [
        statistics.median(values[max(0, place - half) : place + half + 1])
        for place in range(len(values))
    ]


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def _quality(verdict: Comparison) -> Table:
    """Titles, and the cells of every method."""
    return QUALITY_COLUMNS, [
        (
            s.method,
            f"{s.budget:,}",
            f"{s.trainable_parameters:,}",
            f"{s.stored_parameters:,}",
            s.rank,
            f"{s.learning_rate:g}{' (edge)' if s.is_edge else ''}",
            str(s.num_trials),
            plus_minus(s.validation_loss),
            plus_minus(s.test_loss),
            "–" if s.forgetting is None else f"{s.forgetting.mean:+.4f}",
        )
        for s in verdict.summaries
    ]


def _cost(verdict: Comparison) -> Table:
    return COST_COLUMNS, [
        (
            s.method,
            f"{s.budget:,}",
            steps_reached(s.steps_to_reference, s.validation_loss.n),
            "–" if s.seconds_to_reference is None else duration(s.seconds_to_reference),
            f"{s.seconds_per_step:.2f} s",
            duration(s.init_seconds),
            size(s.peak_memory_bytes),
            "–" if s.cost is None else f"{_money(s.cost)} {verdict.currency}",
            f"{s.gradient_variation.mean:.3f}",
            f"{s.clipped_share:.0%}",
        )
        for s in verdict.summaries
    ]


def _money(amount: float) -> str:
    """Two digits behind the point, or as many as show two of a small amount."""
    digits = 2 if not 0 < amount < 0.1 else 1 - math.floor(math.log10(amount))
    return f"{amount:,.{digits}f}"
