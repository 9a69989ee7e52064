"""A comparison as one HTML page that opens from disk and asks the network for nothing.

The page is `comparison_page.html` beside this module with the figures filled in and plotly.js in
it, which the Python package plotly brings along.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from kpsvd_tune.report.comparison import Comparison, MethodSummary, TrialRow
from kpsvd_tune.report.page import plotly_script, script_json
from kpsvd_tune.report.trials import interval, plus_minus, steps_reached

# Okabe and Ito's colours, which colour-blind readers tell apart, on dark and on light.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
# The ninth method and those after it share colours and differ in this.
DASHES = ("solid", "dash", "dot")
# Steps of the moving median of gradient norms: one batch's outlier should not hide the rest.
SMOOTH_STEPS = 5
Style = Mapping[str, str]
COLUMNS = (
    *("method", "budget", "trained", "stored", "rank", "rate", "trials", "validation loss"),
    *("test loss", "steps to reference", "seconds to it", "gradient CV", "clipped", "forgetting"),
    *("s a step", "init s", "peak memory", "cost"),
)


def comparison_page(verdict: Comparison, rows: Sequence[TrialRow]) -> str:
    """Render a comparison as a page with its claims, four figures and its tables.

    Args:
        verdict: The verdict.
        rows: The trials it was drawn from.

    Returns:
        A whole HTML document of about 5 MB, nearly all of it plotly.js.

    Raises:
        InputError: If plotly is not installed.
    """
    methods = list(dict.fromkeys(summary.method for summary in verdict.summaries))
    most = max(s.validation_loss.n for s in verdict.summaries)
    budget = max(s.budget for s in verdict.summaries if s.validation_loss.n == most)
    styles = {
        name: {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place // len(COLOURS) % 3]}
        for place, name in enumerate(methods)
    }
    parts = {
        "model": escape(verdict.model),
        "at": f"at {budget:,} parameters",
        "subtitle": escape(
            f"{verdict.steps} steps a trial, {len(rows)} trials; the reference is "
            f"{verdict.reference}; bands span the seeds, bars are one standard "
            "deviation, intervals are 95 %."
        ),
        "claims": "".join(
            f'<li class="{claim.verdict.replace(" ", "-")}"><b>{claim.verdict}</b>'
            f"{escape(claim.text)}<small>{escape(claim.figure)}</small></li>"
            for claim in verdict.claims
        ),
        "columns": "".join(f'<th scope="col">{title}</th>' for title in COLUMNS),
        "rows": "".join(_row(summary, verdict.currency) for summary in verdict.summaries),
        "differences": "".join(
            f"<tr><th>{escape(each.method)}</th><td>{each.budget:,}</td>"
            f"<td>{escape(each.other)}</td><td>{each.other_budget:,}</td>"
            f"<td>{each.loss.mean:+.4f}{interval(each.loss)}</td></tr>"
            for each in verdict.differences
        ),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in verdict.notes) or "<li>none</li>",
        "plotly": plotly_script("the page of a comparison"),
        "data": script_json(_figures(verdict, rows, budget, styles)),
    }
    template = files("kpsvd_tune.report").joinpath("comparison_page.html")
    text = template.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


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
    # The first validation after the start sets the scale; the start itself would flatten the rest.
    later = [loss for own in chosen.values() for r in own for _, loss in r.validation_losses[1:]]
    low, high = min(later, default=0.0), max(later, default=1.0)
    scale = {"range": [low - 0.05 * (high - low), high + 0.05 * (high - low)]}
    return {
        "curves": _figure(curves, "step", "validation loss", scale=scale),
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
    line = {
        "x": xs,
        "y": [statistics.fmean(each) for each in columns],
        "name": escape(name),
        "legendgroup": name,
        "mode": "lines",
        "line": {**style, "width": 2},
    }
    if len(seeds) == 1:
        return [line]
    band = {
        "x": [*xs, *reversed(xs)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": style["color"],
        "mode": "lines",
        "opacity": 0.18,
        "line": {"width": 0},
        "legendgroup": name,
        "showlegend": False,
        "hoverinfo": "skip",
    }
    return [band, line]


def _front(method: str, summaries: Sequence[MethodSummary], style: Style) -> dict[str, Any]:
    return {
        "x": [s.trainable_parameters for s in summaries],
        "y": [s.validation_loss.mean for s in summaries],
        "error_y": {
            "array": [s.validation_loss.deviation or 0.0 for s in summaries],
            "thickness": 1,
        },
        "name": escape(method),
        "mode": "lines+markers",
        "line": {**style, "width": 2},
    }


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
        {
            "x": rates,
            "y": [statistics.fmean(own[rate]) for rate in rates],
            "name": escape(method),
            "legendgroup": method,
            "mode": "lines",
            "line": {**style, "width": 2},
        },
        {
            "x": [rate for rate, _ in dots],
            "y": [loss for _, loss in dots],
            "mode": "markers",
            "marker": {"color": style["color"], "size": 7},
            "legendgroup": method,
            "showlegend": False,
            "hoverinfo": "skip",
        },
    ]


def _figure(
    traces: list[dict[str, Any]],
    x_title: str,
    y_title: str,
    *,
    x_type: str = "linear",
    y_type: str = "linear",
    scale: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "traces": traces,
        "x": {"title": {"text": x_title}, "type": x_type},
        "y": {"title": {"text": y_title}, "type": y_type, **(scale or {})},
    }


def _moving_median(values: Sequence[float]) -> list[float]:
    half = SMOOTH_STEPS // 2
    return [
        statistics.median(values[max(0, place - half) : place + half + 1])
        for place in range(len(values))
    ]


def _row(summary: MethodSummary, currency: str) -> str:
    steps, seconds = summary.steps_to_reference, summary.seconds_to_reference
    cells = (
        f"{summary.budget:,}",
        f"{summary.trainable_parameters:,}",
        f"{summary.stored_parameters:,}",
        summary.rank,
        f"{summary.learning_rate:g}{' (edge)' if summary.is_edge else ''}",
        str(summary.num_trials),
        plus_minus(summary.validation_loss),
        plus_minus(summary.test_loss),
        steps_reached(steps, summary.validation_loss.n),
        "–" if seconds is None else f"{seconds:.0f}",
        f"{summary.gradient_variation.mean:.3f}",
        f"{summary.clipped_share:.0%}",
        "–" if summary.forgetting is None else f"{summary.forgetting.mean:+.4f}",
        f"{summary.seconds_per_step:.2f}",
        f"{summary.init_seconds:.1f}",
        f"{summary.peak_memory_bytes / 2**30:.2f} GiB",
        "–" if summary.cost is None else f"{summary.cost:.4f} {currency}",
    )
    return (
        f"<tr><th scope='row'>{escape(summary.method)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
    )
