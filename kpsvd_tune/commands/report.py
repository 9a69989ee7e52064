"""The command `report`: a run again, its page, two runs side by side, or a comparison's verdict."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kpsvd_tune.commands.options import Debug, Json, emit
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.report.comparison import read_comparison
from kpsvd_tune.report.console import show_comparison
from kpsvd_tune.report.live_page import PAGE
from kpsvd_tune.report.pair import set_side_by_side
from kpsvd_tune.report.pair_console import show_pair
from kpsvd_tune.report.results import PairedScore
from kpsvd_tune.report.run_console import show_run_report, told
from kpsvd_tune.report.run_files import RunFiles, completions_file, read_run_files
from kpsvd_tune.storage.paths import expand, kind_of


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run or of a comparison.")
    ],
    other: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Another run, to set beside the first.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="The rank of every layer too.")] = False,
    html: Annotated[
        bool, typer.Option("--html", help="Write a page: RUN/report.html, for two A-and-B.html.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Another place for the page.")
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour",
            min=0,
            help="Of a device: tell what a run cost, in place of the recipe's "
            "compare.price_per_hour.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the results of a run again, two runs side by side, or the verdict of a comparison."""
    if output is not None and not html:
        raise InputError("--output is the place of the page: add --html")
    folder = expand(run)
    if other is not None:
        _report_pair(folder, expand(other), html, output, as_json, price)
    elif kind_of(folder) == "comparison":
        if html:
            raise InputError(
                f"{folder} is the folder of a comparison, whose page `compare` writes: open "
                f"{folder / 'comparison.html'}, or write it again with compare --plan done"
            )
        if price is not None:
            raise InputError(
                f"--price-per-hour {price:g}: {folder} is the folder of a comparison, whose costs "
                "are written with it; expected a run. Give the price to `compare`, with "
                "compare.price_per_hour and --plan done"
            )
        emit(read_comparison(folder), as_json, show_comparison)
    else:
        _report_run(_read(folder, price), html, output, as_json, layers)


def _read(folder: Path, price: float | None) -> RunFiles:
    found = read_run_files(folder)
    return found if price is None else found.at_price(price)


def _report_run(
    found: RunFiles, html: bool, output: Path | None, as_json: bool, layers: bool
) -> None:
    if not html:
        emit(told(found), as_json, lambda _: show_run_report(found, layers=layers))
        return
    # What draws pages is loaded where one is asked for.
    from kpsvd_tune.report.pages import check_page
    from kpsvd_tune.report.run_page import write_run_page

    page = found.folder / PAGE if output is None else expand(output)
    check_page(page)
    write_run_page(found, page)
    _emit_page(page, told(found), as_json)


def _emit_page(page: Path, content: dict[str, Any], as_json: bool) -> None:
    emit({**content, "page": str(page)}, as_json, lambda _: typer.echo(f"page: {page}"))


def _report_pair(
    first: Path,
    second: Path,
    html: bool,
    output: Path | None,
    as_json: bool,
    price: float | None,
) -> None:
    for folder in (first, second):
        if kind_of(folder) == "comparison":
            raise InputError(
                f"{folder} is the folder of a comparison; expected two runs. Its trials lie in "
                f"{folder / 'trials'}, and kpsvd-tune report "
                f"{shlex.quote(str(folder))} shows the verdict"
            )
    runs = _read(first, price), _read(second, price)
    if first.resolve() == second.resolve():
        raise InputError(f"{first} and {second} are the same run; expected two")
    pair = set_side_by_side(*runs, _paired(*runs))
    if not html:
        emit(pair, as_json, show_pair)
        return
    from kpsvd_tune.report.pages import check_page
    from kpsvd_tune.report.pair_page import write_pair_page

    page = expand(output) if output else Path(f"{runs[0].name}-and-{runs[1].name}.html")
    check_page(page)
    write_pair_page(pair, runs, page)
    _emit_page(page, pair.to_dict(), as_json)


def _paired(first: RunFiles, second: RunFiles) -> dict[str, Mapping[str, PairedScore] | str]:
    """Differences question by question of the tasks that both were scored on, or why not."""
    from kpsvd_tune.evaluation.paired import paired_scores

    found: dict[str, Mapping[str, PairedScore] | str] = {}
    shared = [
        task for task in first.results.get("scores", {}) if task in second.results.get("scores", {})
    ]
    for task in shared:
        files = [completions_file(run.folder, task) for run in (first, second)]
        if files[0] is None or files[1] is None:
            continue
        try:
            found[task] = paired_scores(files[0], files[1])
        except DataError as error:
            found[task] = str(error)
    return found
