"""The rank report as JSON, CSV and one HTML page that opens from disk without a network.

The page is `rank_page.html` beside this module with the report filled in and plotly.js in it; the
script there answers what the reader clicks on.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.plotly_script import plotly_script
from kpsvd_tune.report.results import LayerReport, RankReport
from kpsvd_tune.units import duration

# Characters of a kind of module that fit beside the heat map.
KIND_WIDTH = 40
# The place of modules that belong to no numbered layer, such as lm_head.
NO_LAYER = "other"
# Of cells that are aligned to the left.
_TEXT = ' class="text"'
# Title of a table column -> its sort key is text (False) or a number (True).
COLUMNS = {
    "module": False,
    "out × in": True,
    "A": True,
    "B": True,
    "by energy": True,
    "by elbow": True,
    "rank": True,
    "bound by": False,
    "energy kept": True,
    "parameters": True,
    "relative error": True,
    "stable rank": True,
    "time": True,
    "note": False,
}


def write_rank_report(report: RankReport, folder: Path) -> str | None:
    """Write rank_report.json, rank_report.csv and rank_report.html, each replaced as a whole.

    Args:
        report: The ranks of all layers.
        folder: Made if it does not exist.

    Returns:
        Why there is no page, where plotly is not installed; None otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = report.to_dict()
    _replace(folder / "rank_report.json", json.dumps(content, indent=1) + "\n")
    text = io.StringIO()
    columns = [each.name for each in fields(LayerReport) if each.name != "singular_values"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for layer in content["layers"]:
        shape = "x".join(str(size) for size in layer["factor_shape"])
        writer.writerow({**layer, "factor_shape": shape})
    _replace(folder / "rank_report.csv", text.getvalue())
    page = folder / "rank_report.html"
    try:
        _replace(page, rank_page(report))
    except InputError as error:
        # A page of earlier ranks beside the new tables would tell something else than they do.
        page.unlink(missing_ok=True)
        return f"{page.name} was not written: {error}"
    return None


def rank_page(report: RankReport) -> str:
    """Render the ranks of all layers as a page with a heat map, spectra, totals and a table.

    Args:
        report: The ranks of all layers.

    Returns:
        A whole HTML document of about 2 MB, nearly all of it plotly.js.

    Raises:
        InputError: If plotly is not installed.
    """
    unused = _unused(report)
    parts = {
        "model": escape(report.model),
        "rule": _rule(report),
        "cards": _cards(report),
        "budget": _budget(report),
        "columns": "".join(
            f'<th scope="col" aria-sort="none"><button data-numeric="{int(numeric)}">{title}'
            "</button></th>"
            for title, numeric in COLUMNS.items()
            if title not in unused
        ),
        "meaning": _meaning(unused),
        "rows": "\n".join(_row(index, layer, unused) for index, layer in enumerate(report.layers)),
        "untouched": _untouched(report),
        "plotly": plotly_script("the HTML rank report"),
        "data": script_json(_data(report, unused)),
    }
    template = files("kpsvd_tune.report").joinpath("rank_page.html").read_text(encoding="utf-8")
    # One pass: a module's name that looks like a placeholder is filled in, never replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def heat_map_place(name: str) -> tuple[str, int | None, str]:
    """Split a module's name at its first number.

    Args:
        name: Full module name, such as model.layers.3.mlp.up_proj.

    Returns:
        What stands before the number, the number, and what stands behind it: the stack, the layer
        and the kind of the module. A name without a number is all kind, in no layer.
    """
    words = name.split(".")
    for index, word in enumerate(words):
        if word.isascii() and word.isdigit():
            return ".".join(words[:index]), int(word), ".".join(words[index + 1 :])
    return "", None, name


def _data(report: RankReport, unused: set[str]) -> dict[str, Any]:
    """What the page's script draws: the layers, and which of them stands in which cell."""
    places = [heat_map_place(layer.name) for layer in report.layers]
    # Models with an encoder and a decoder number the layers of each from zero.
    several = len({stack for stack, number, _ in places if number is not None}) > 1
    kinds = [
        f"{stack}: {kind}" if several and number is not None else kind
        for stack, number, kind in places
    ]
    rows = {kind: row for row, kind in enumerate(dict.fromkeys(kinds))}
    numbers = sorted({number for _, number, _ in places if number is not None})
    columns: dict[int | None, int] = {number: column for column, number in enumerate(numbers)}
    if any(number is None for _, number, _ in places):
        columns[None] = len(columns)
    cells: list[list[int | None]] = [[None] * len(columns) for _ in rows]
    for index, ((_, number, _), kind) in enumerate(zip(places, kinds, strict=True)):
        cells[rows[kind]][columns[number]] = index
    return {
        "columns": [NO_LAYER if number is None else str(number) for number in columns],
        "rows": [_plot_text(_shorten(kind, KIND_WIDTH)) for kind in rows],
        "cells": cells,
        # Proposals that the rule asks for are marked in the spectrum.
        "uses": {name: f"by {name}" not in unused for name in ("energy", "elbow")},
        "layers": [
            {
                **layer.to_dict(),
                "label": _plot_text(layer.name),
                "bound_by_label": _plot_text(layer.bound_by),
            }
            for layer in report.layers
        ],
    }


def _rule(report: RankReport) -> str:
    """The rank rule in one line, without the keys that were left empty."""
    stated = [f"{key} {value}" for key, value in report.rule.items() if value not in (None, {}, [])]
    return escape(f"Rank rule: {', '.join(stated)}." if stated else "")


def _cards(report: RankReport) -> str:
    """The totals above the heat map."""
    ranks = [layer.rank for layer in report.layers]
    trainable, base = report.totals["trainable_parameters"], report.totals["base_parameters"]
    lora = _lora_rank_one(report)
    cards = {
        "matrices with an adapter": f"{sum(rank > 0 for rank in ranks)} of {len(ranks)}",
        "Kronecker rank, mean": f"{sum(ranks) / max(1, len(ranks)):.2f}"
        f"<small>{_spread(ranks)}</small>",
        f"trainable parameters, {_percent(trainable, base)} of the base": f"{trainable:,}",
        "of the windows' energy kept": f"{100 * report.totals['energy']:.1f} %",
        "LoRA rank for the same budget": f"{trainable / lora:.2f}" if lora else "–",
    }
    return "".join(f"<li><b>{value}</b>{title}</li>" for title, value in cards.items())


def _budget(report: RankReport) -> str:
    """Rows that set the parameters beside those of LoRA and PiSSA, which cost the same."""
    ranks = [layer.rank for layer in report.layers]
    trainable, lora = int(report.totals["trainable_parameters"]), _lora_rank_one(report)
    lines = [
        ("this adapter", _spread(ranks), trainable),
    ]
    if lora:
        within = trainable // lora
        # The last rank that fits the budget and the first that does not.
        lines += [
            ("LoRA or PiSSA on the same layers", str(rank), rank * lora)
            for rank in sorted({1, max(1, within), within + 1})
        ]
    return "".join(
        f"<tr><td>{title}</td><td>{rank}</td><td>{parameters:,}</td>"
        f"<td>{_percent(parameters, trainable)}</td></tr>"
        for title, rank, parameters in lines
    )


def _spread(ranks: Sequence[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return f"{low} everywhere" if low == high else f"{low} to {high}"


def _lora_rank_one(report: RankReport) -> int:
    return sum(layer.out_features + layer.in_features for layer in report.layers if layer.rank > 0)


def _unused(report: RankReport) -> set[str]:
    """Columns that say nothing here: proposals that the rank rule does not ask for, no notes."""
    method = str(report.rule.get("method", "energy+elbow"))
    unused = {f"by {name}" for name in ("energy", "elbow") if name not in method}
    return unused if any(layer.note for layer in report.layers) else unused | {"note"}


def _meaning(unused: set[str]) -> str:
    """What the columns of proposals say; a proposal of 0 is a find, and looks like a fault."""
    parts = {
        "by energy": "<b>by energy</b> is the rank that the energy threshold alone asks for; where "
        "it is 0, the terms that hold the wanted share of all layers together are all in other "
        "layers.",
        "by elbow": "<b>by elbow</b> is the rank at the bend of the layer's spectrum.",
    }
    told = [text for name, text in parts.items() if name not in unused]
    told.append(
        "<b>bound by</b> names the rule that decided the rank in the end: a proposal, or the "
        "recipe's min, max, budget or overrides."
    )
    return " ".join(told)


def _row(index: int, layer: LayerReport, unused: set[str]) -> str:
    m, n, p, q = layer.factor_shape
    cells: dict[str, tuple[str | float, str]] = {
        "out × in": (
            layer.out_features * layer.in_features,
            f"{layer.out_features} × {layer.in_features}",
        ),
        "A": (m * n, f"{m} × {n}"),
        "B": (p * q, f"{p} × {q}"),
        "by energy": (layer.rank_energy, str(layer.rank_energy)),
        "by elbow": (layer.rank_elbow, str(layer.rank_elbow)),
        "rank": (layer.rank, f"<b>{layer.rank}</b>"),
        "bound by": (layer.bound_by, escape(layer.bound_by)),
        "energy kept": (layer.energy_total, f"{100 * layer.energy_total:.1f} %"),
        "parameters": (layer.parameters, f"{layer.parameters:,}"),
        "relative error": (layer.relative_error, f"{layer.relative_error:.3f}"),
        "stable rank": (layer.stable_rank, f"{layer.stable_rank:.1f}"),
        "time": (layer.seconds, duration(layer.seconds)),
        "note": (layer.note or "", escape(layer.note or "")),
    }
    return (
        f'<tr data-layer="{index}"><th scope="row" data-key="{escape(layer.name)}">'
        f'<button class="pick">{escape(layer.name)}</button></th>'
        + "".join(
            f'<td data-key="{escape(str(key))}"{_TEXT if title == "note" else ""}>{shown}</td>'
            for title, (key, shown) in cells.items()
            if title not in unused
        )
        + "</tr>"
    )


def _untouched(report: RankReport) -> str:
    if not report.untouched:
        return ""
    items = "".join(
        f"<li><code>{escape(name)}</code>: {escape(reason)}</li>"
        for name, reason in report.untouched
    )
    return (
        f"<details><summary>{len(report.untouched)} weight matrices left alone</summary>"
        f"<ul>{items}</ul></details>"
    )


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g}\N{NO-BREAK SPACE}%" if whole else "–"


def _plot_text(text: str) -> str:
    """Escape what Plotly would take for a tag or an entity in a label."""
    return escape(text, quote=False)


def script_json(value: Any) -> str:
    """Give JSON that cannot end the script element it stands in; null for what is not finite."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _shorten(name: str, width: int) -> str:
    """Cut the start of a module's name: its end says which layer it is."""
    return name if len(name) <= width else "…" + name[1 - width :]
