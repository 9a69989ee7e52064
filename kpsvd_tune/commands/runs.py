"""The command `runs`: the runs and comparisons under a folder, with their key figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kpsvd_tune.commands.options import Debug, Json, emit
from kpsvd_tune.report.run_list import Key, list_runs, show_runs
from kpsvd_tune.storage.paths import expand


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where to look; default: the folder you are in.")
    ] = Path(),
    sort: Annotated[
        Key, typer.Option("--sort", help="Lowest first; date and score: newest and highest.")
    ] = "date",
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs and comparisons under a folder."""
    emit(list_runs(expand(folder), sort, reverse=reverse), as_json, show_runs)
