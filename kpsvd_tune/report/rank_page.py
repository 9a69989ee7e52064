"""The rank report as JSON, CSV and an HTML page, `templates/rank.html.j2` filled in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import some_of
from kpsvd_tune.report.heat_map import heat_map, plot_text
from kpsvd_tune.report.pages import render, write_page
from kpsvd_tune.report.results import LayerReport, RankReport
from kpsvd_tune.storage.durable import make_folder, replace_file


def write_rank_report(report: RankReport, folder: Path) -> str | None:
    """Write rank_report.json, .csv and .html into a folder, made if it does not exist.

    Returns:
        Why there is no page, where plotly is not installed; None otherwise.

    Raises:
        ResourceError: The disk refused.
    """
    make_folder(folder)
    content = report.to_dict()
    text = io.StringIO()
    columns = [each.name for each in fields(LayerReport) if each.name != "singular_values"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for layer in content["layers"]:
        shape = "x".join(str(size) for size in layer["factor_shape"])
        writer.writerow({**layer, "factor_shape": shape})
    replace_file(folder / "rank_report.json", f"{json.dumps(content, indent=1)}\n".encode())
    replace_file(folder / "rank_report.csv", text.getvalue().encode())
    page = folder / "rank_report.html"
    return write_page(page, lambda: rank_page(report))


def rank_page(report: RankReport) -> str:
    """Render the ranks of all layers as a page with a heat map, spectra, totals and a table."""
    # Columns that say nothing here: proposals that the rank rule does not ask for, no notes.
    method = str(report.rule.get("method", "energy+elbow"))
    unused = {f"by {name}" for name in ("energy", "elbow") if name not in method}
    if not any(layer.note for layer in report.layers):
        unused.add("note")
    rows = [
        {title: cell for title, cell in layer.in_words().items() if title not in unused}
        for layer in report.layers
    ]
    first = rows[0] if rows else {}
    columns = {title: not isinstance(key, str) for title, (key, _) in first.items()}
    stated = [f"{key} {value}" for key, value in report.rule.items() if value not in (None, {}, [])]
    return render(
        "rank",
        "the HTML rank report",
        _data(report, columns),
        model=report.model,
        rule=f"Rank rule: {', '.join(stated)}." if stated else "",
        cards=_cards(report),
        budget=_budget(report),
        columns=columns,  # title -> whether its sort keys are numbers
        rows=rows,
        untouched=report.untouched,
    )


def _data(report: RankReport, columns: Collection[str]) -> dict[str, Any]:
    """What the page's script draws: the layers, and the cell of each."""
    return {
        **heat_map([layer.name for layer in report.layers]),
        # Proposals that the rule asks for are marked in the spectrum.
        "uses": {name: f"by {name}" in columns for name in ("energy", "elbow")},
        "layers": [
            {
                **layer.to_dict(),
                "label": plot_text(layer.name),
                "bound_by_label": plot_text(layer.bound_by),
            }
            for layer in report.layers
        ],
    }


def _cards(report: RankReport) -> list[dict[str, str]]:
    """The totals above the heat map."""
    ranks = [layer.rank for layer in report.layers]
    trainable, base = report.totals["trainable_parameters"], report.totals["base_parameters"]
    lora = report.lora_parameters
    mean = f"{sum(ranks) / max(1, len(ranks)):.2f}"
    cards: tuple[tuple[str, str, str], ...] = (
        (f"{sum(rank > 0 for rank in ranks)} of {len(ranks)}", "", "matrices with an adapter"),
        (mean, _spread(ranks), "Kronecker rank, mean"),
        (f"{trainable:,}", "", f"trainable parameters, {_percent(trainable, base)} of the base"),
        (f"{100 * report.totals['energy']:.1f} %", "", "of the windows' energy kept"),
        (f"{trainable / lora:.2f}" if lora else "–", "", "LoRA rank for the same budget"),
    )
    if whole := report.trained_whole:
        title = f"parameters more, trained whole: {some_of([*whole])}"
        cards = (*cards, (f"{sum(whole.values()):,}", "", title))
    return [dict(zip(("value", "spread", "title"), card, strict=True)) for card in cards]


def _budget(report: RankReport) -> list[tuple[str, ...]]:
    """Rows that compare the parameters with those of LoRA and PiSSA, which cost the same."""
    ranks = [layer.rank for layer in report.layers]
    trainable, lora = int(report.totals["trainable_parameters"]), report.lora_parameters
    lines = [("this adapter", _spread(ranks), trainable)]
    if lora:
        within = trainable // lora
        # The last rank that fits the budget and the first that does not.
        lines += [
            ("LoRA or PiSSA on the same layers", str(rank), rank * lora)
            for rank in sorted({1, max(1, within), within + 1})
        ]
    return [
        (title, rank, f"{parameters:,}", _percent(parameters, trainable))
        for title, rank, parameters in lines
    ]


def _spread(ranks: Sequence[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return f"{low} everywhere" if low == high else f"{low} to {high}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g}\N{NO-BREAK SPACE}%" if whole else "–"
