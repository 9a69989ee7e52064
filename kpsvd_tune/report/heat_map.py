"""The places of a model's modules in a heat map: a column for each layer, a row for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

# Characters of a kind of module that fit beside the heat map.
KIND_WIDTH = 40
# The place of modules that belong to no numbered layer, such as lm_head.
NO_LAYER = "other"


def heat_map(names: Sequence[str]) -> dict[str, Any]:
    """What `templates/heat_map.js` draws of modules: columns, rows, and cells.

    A cell holds the place of its module among the names, or None.
    """
    places = [heat_map_place(name) for name in names]
    # Models with an encoder and a decoder number the layers of each from zero.
    several = len({stack for stack, number, _ in places if number is not None}) > 1
    kinds = [
        f"{stack}: {kind}" if several and number is not None else kind
        for stack, number, kind in places
    ]
    rows = {kind: row for row, kind in enumerate(dict.fromkeys(kinds))}
    numbers = sorted({number for _, number, _ in places if number is not None})
    at: dict[int | None, int] = {number: place for place, number in enumerate(numbers)}
    if any(number is None for _, number, _ in places):
        at[None] = len(at)
    cells: list[list[int | None]] = [[None] * len(at) for _ in rows]
    for index, ((_, number, _), kind) in enumerate(zip(places, kinds, strict=True)):
        cells[rows[kind]][at[number]] = index
    return {
        "columns": [NO_LAYER if number is None else str(number) for number in at],
        "rows": [plot_text(_shorten(kind)) for kind in rows],
        "cells": cells,
    }


def heat_map_place(name: str) -> tuple[str, int | None, str]:
    """Split a module's name at its first number, into stack, layer and kind of the module.

    A name without a number is all kind, in no layer.
    """
    words = name.split(".")
    for index, word in enumerate(words):
        if word.isascii() and word.isdigit():
            return ".".join(words[:index]), int(word), ".".join(words[index + 1 :])
    return "", None, name


def plot_text(text: str) -> str:
    """Escape what Plotly would take for a tag or an entity in a label."""
    return escape(text, quote=False)


def _shorten(name: str) -> str:
    """Cut the start of a module's name: its end says which layer it is."""
    return name if len(name) <= KIND_WIDTH else "…" + name[1 - KIND_WIDTH :]
