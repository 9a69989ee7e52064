"""Writes the rank report as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

from kpsvd_tune.report.results import RankReport


def write_rank_report(report: RankReport, folder: Path) -> None:
    """Write rank_report.json and rank_report.csv, each replaced as a whole.

    Args:
        report: The ranks of all layers.
        folder: Made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = report.to_dict()
    _replace(folder / "rank_report.json", json.dumps(content, indent=1) + "\n")
    text = io.StringIO()
    columns = [name for name in content["layers"][0] if name != "singular_values"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for layer in content["layers"]:
        shape = "x".join(str(size) for size in layer["factor_shape"])
        writer.writerow({**layer, "factor_shape": shape})
    _replace(folder / "rank_report.csv", text.getvalue())


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
