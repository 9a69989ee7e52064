"""Commands that follow a recipe: train and init-only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kpsvd_tune.cli.shared import (
    AllowOtherBase,
    Debug,
    DryRun,
    Gpus,
    Json,
    Offline,
    Overrides,
    Processes,
    RecipeArgument,
    SandboxOption,
    app,
    check_devices,
    emit,
    launch_processes,
    prepare_libraries,
)
from kpsvd_tune.errors import InputError, WorseThanBaseError
from kpsvd_tune.recipe import Recipe, load_recipe
from kpsvd_tune.report import console as view


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    accelerate_config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Accelerate's configuration, for DeepSpeed."),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto continues the run, never starts it anew, or a checkpoint.")
    ] = "auto",
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Continue although this recipe key has changed."),
    ] = None,
    allow_other_base: AllowOtherBase = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run generated code when scoring MBPP.")
    ] = False,
    sandbox: SandboxOption = "bwrap",
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decompose, train, score and save the adapter of a recipe."""
    resolved = load_recipe(
        recipe, overrides or (), look_up=("model", "dataset", "adapter", "evaluation")
    )
    launch_processes(gpus, processes, accelerate_config)
    prepare_libraries(offline, debug)
    from kpsvd_tune import pipeline

    with view.Events() as events:
        if dry_run:
            emit(pipeline.plan(resolved, events, offline=offline), as_json, view.show_plan)
            return
        result = pipeline.train(
            resolved,
            events,
            offline=offline,
            resume=resume,
            allow_change=tuple(allow_change or ()),
            allow_other_base=allow_other_base,
            allow_code_execution=allow_code_execution,
            sandbox=sandbox,  # type: ignore[arg-type]  # checked before any work
        )
        # First the results, which are whole and saved, then what is wrong with them.
        emit(result, as_json, view.show_results)
        if message := pipeline.worse_message(result, resolved):
            raise WorseThanBaseError(message)


@app.command("init-only")
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
