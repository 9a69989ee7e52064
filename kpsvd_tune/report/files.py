"""Writes the rank report as JSON, CSV and a page."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import fields
from pathlib import Path

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.page import rank_page
from kpsvd_tune.report.results import LayerReport, RankReport


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


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
