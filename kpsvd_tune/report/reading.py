"""Reads a run's or a comparison's folder back, for showing it again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.comparison import Comparison
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.storage.json_files import read_json
from kpsvd_tune.storage.paths import kind_of, named, siblings

# Runs that a message names of a folder that holds several.
_SHOWN = 8


def read_run(run: Path) -> dict[str, Any]:
    """Return the rank report and the results of a run, each None where it does not exist yet.

    Raises:
        InputError: The folder is not a run, or a file in it is not what a run writes.
    """
    ranks, results = run / "init" / "rank_report.json", run / "results.json"
    if not (os.path.isfile(ranks) or os.path.isfile(results)):
        kind = kind_of(run)
        found = f"; it is {named(kind)}" if kind else "; nothing lies there"
        if within := _runs_in(run):
            found += f" with {', '.join(within)} in it: name one of them"
        raise InputError(
            f"{run} holds neither init/rank_report.json nor results.json{found}; expected the "
            "output_dir of a recipe after `kpsvd-tune init-only`, `train` or `compare`"
            f"{'' if kind else siblings(run)}"
        )
    cure = "was it edited or cut? Write it again with `kpsvd-tune init-only`"
    return {
        "ranks": RankReport.from_dict(read_json(ranks, error=InputError, cure=cure)).to_dict()
        if os.path.isfile(ranks)
        else None,
        "results": read_json(results, error=InputError) if os.path.isfile(results) else None,
    }


def _runs_in(folder: Path) -> list[str]:
    """Runs and comparisons that lie directly in a folder, the first few of them."""
    if not os.path.isdir(folder):
        return []
    found = [each for each in sorted(folder.iterdir()) if kind_of(each) in ("run", "comparison")]
    names = [str(each) for each in found[:_SHOWN]]
    return names + ["..."] * (len(found) > _SHOWN)


def read_comparison(folder: Path) -> Comparison:
    """Return the verdict that a comparison wrote.

    Raises:
        InputError: There is no verdict yet, or the file is not what a comparison writes.
    """
    file = folder / "comparison.json"
    if not os.path.isfile(file):
        raise InputError(
            f"{folder} is the folder of a comparison without a verdict yet: run the command "
            "`kpsvd-tune compare` again, or with --plan done to judge the trials that are there"
        )
    cure = "write it again with `kpsvd-tune compare` and --plan done"
    return read_json(file, Comparison, error=InputError, cure=cure)
