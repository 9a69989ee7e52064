"""Commands that follow a recipe: train and init-only."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kpsvd_tune.cli.shared import (
    Debug,
    DryRun,
    Gpus,
    Json,
    Offline,
    Overrides,
    Processes,
    RecipeArgument,
    app,
    emit,
    prepare_libraries,
)
from kpsvd_tune.errors import InputError, KpsvdTuneError
from kpsvd_tune.recipe import Recipe, load_recipe
from kpsvd_tune.report import console as view


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    resume: Annotated[
        str, typer.Option(help="auto continues the run, never starts it anew, or a checkpoint.")
    ] = "auto",
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Continue although this recipe key has changed."),
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run generated code when scoring MBPP.")
    ] = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decompose, train, score and save the adapter of a recipe."""
    resolved = load_recipe(recipe, overrides or ())
    _launch_processes(gpus, processes)
    prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        if dry_run:
            emit(pipeline.plan(resolved, events, offline=offline), as_json, view.show_plan)
            return
        try:
            result = pipeline.train(
                resolved,
                events,
                offline=offline,
                resume=resume,
                allow_change=tuple(allow_change or ()),
                allow_code_execution=allow_code_execution,
            )
        except KpsvdTuneError as error:
            # What all ranks raise, the first one tells.
            if error.is_everywhere and int(os.environ.get("RANK", "0")):
                raise typer.Exit(error.exit_code) from error
            raise
        emit(result, as_json, view.show_results)


@app.command("init-only")
def init_only(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Processes = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B,C", help="Show the totals for several values of a key."),
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decompose and choose the ranks, without data and without training."""
    resolved = load_recipe(recipe, overrides or ())
    prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        if sweep:
            variants = _sweep(recipe, overrides or (), sweep)
            emit(
                pipeline.sweep_ranks(variants, events, offline=offline, processes=processes or 1),
                as_json,
                view.show_sweep,
            )
            return
        report = pipeline.init_only(resolved, events, offline=offline, processes=processes or 1)
        emit(report, as_json, view.show_ranks)
        events.note(f"written: {Path(resolved.output_dir) / 'init'}/rank_report.json and .csv")


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


def _launch_processes(gpus: int | None, processes: int | None) -> None:
    """Start the same command on several ranks, unless this is one of them already."""
    if gpus and processes:
        raise InputError("--gpus and --processes exclude each other: GPUs, or CPU processes")
    count = gpus or processes
    if count is None or "WORLD_SIZE" in os.environ:
        return
    if processes == 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if count == 1:
        return
    from kpsvd_tune.launch import launch

    raise typer.Exit(launch(sys.argv[1:], count, use_cpu=processes is not None))
