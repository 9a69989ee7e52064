"""The command `init-only`: the ranks of a recipe, without data and without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kpsvd_tune.commands.options import (
    Debug,
    Json,
    Offline,
    Overrides,
    RecipeArgument,
    check_devices,
    emit,
    prepare_libraries,
)
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import Recipe, load_recipe
from kpsvd_tune.report import console as view


def init_only(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Decompose on that many GPUs.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Decompose in that many CPU processes."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B,C", help="Show the totals for several values of a key."),
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decompose and choose the ranks, without data and without training."""
    resolved = load_recipe(recipe, overrides or (), look_up=("model",))
    check_devices(gpus, processes)
    prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        if sweep:
            variants = _sweep(recipe, overrides or (), sweep)
            emit(
                pipeline.sweep_ranks(
                    variants, events, offline=offline, processes=processes or 1, gpus=gpus
                ),
                as_json,
                view.show_sweep,
            )
            return
        report = pipeline.init_only(
            resolved, events, offline=offline, processes=processes or 1, gpus=gpus
        )
        emit(report, as_json, view.show_ranks)
        init = Path(resolved.output_dir) / "init"
        page = init / "rank_report.html"
        look = f"; open {page} in a browser" if page.exists() else ""
        events.note(f"written: {init}/rank_report.json and .csv{look}")


def _sweep(recipe: str, overrides: Sequence[str], sweep: list[str]) -> dict[str, Recipe]:
    """One recipe per value of each KEY=A,B,C."""
    variants = {}
    for item in sweep:
        key, separator, values = item.partition("=")
        if not separator or not values:
            raise InputError(f"--sweep {item}: expected KEY=A,B,C, as adapter.rank.energy=0.3,0.5")
        for value in values.split(","):
            setting = f"{key}={value}"
            variants[setting] = load_recipe(recipe, [*overrides, setting])
    return variants
