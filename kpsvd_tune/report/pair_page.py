"""Two runs side by side as an HTML page, `templates/pair.html.j2` filled in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kpsvd_tune.report.figures import PALETTES, Style, Trace, figure, smooth, thinned
from kpsvd_tune.report.pages import render
from kpsvd_tune.report.pair import Pair
from kpsvd_tune.report.pair_console import curve_cells, score_cells
from kpsvd_tune.report.run_files import RunFiles
from kpsvd_tune.report.run_words import series, validations
from kpsvd_tune.storage.durable import replace_file


def write_pair_page(pair: Pair, runs: Sequence[RunFiles], file: Path) -> None:
    """Write the page of two runs.

    Raises:
        InputError: plotly is not installed.
        ResourceError: The disk refused.
    """
    replace_file(file, pair_page(pair, runs).encode("utf-8", errors="backslashreplace"))


def pair_page(pair: Pair, runs: Sequence[RunFiles]) -> str:
    """Render two runs as a page: figures and scores first, then what they were made of.

    Raises:
        InputError: plotly is not installed.
    """
    styles = [Style(name, place) for place, name in enumerate(pair.names)]
    checks: list[Trace] = []
    trained: list[Trace] = []
    for run, style in zip(runs, styles, strict=True):
        steps, values = validations(run)
        if steps:
            xs, ys = thinned(steps, values)
            checks.append(style.line(xs, ys, mode="lines+markers", marker={"size": 6}))
        steps, values = series(run.metrics, "loss")
        if steps:
            trained.append(style.line(*thinned(steps, smooth(values)[0])))
    figures = {
        name: figure(traces, "step", axis)
        for name, traces, axis in (
            ("checks", checks, "validation loss"),
            ("trained", trained, "training loss"),
        )
        if traces
    }
    return render(
        "pair",
        "the page of two runs",
        {"figures": figures, "palettes": PALETTES},
        model=f"{pair.first} and {pair.second}",
        pair=pair,
        drawn=[name for name in ("checks", "trained") if name in figures],
        curve=curve_cells(pair),
        scores=[score_cells(each) for each in pair.scores],
    )
