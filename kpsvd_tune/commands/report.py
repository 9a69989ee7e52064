"""The command `report`: the results of a run or the verdict of a comparison, again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kpsvd_tune.commands.options import Debug, Json, emit
from kpsvd_tune.report import console as view
from kpsvd_tune.report.comparison import read_comparison
from kpsvd_tune.report.console import show_comparison
from kpsvd_tune.report.run import read_run
from kpsvd_tune.storage.paths import expand, kind_of


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run or of a comparison.")
    ],
    layers: Annotated[bool, typer.Option("--layers", help="The rank of every layer too.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the results of a run again, and its ranks; or the verdict of a comparison."""
    folder = expand(run)
    if kind_of(folder) == "comparison":
        emit(read_comparison(folder), as_json, show_comparison)
    else:
        emit(read_run(folder), as_json, lambda found: view.show_run(found, layers=layers))
