"""The command `plan`: what a run would do and take, and whether this machine has it."""

from __future__ import annotations

from typing import Annotated

import typer

from kpsvd_tune.commands.options import (
    Debug,
    Gpus,
    Json,
    Offline,
    Overrides,
    Processes,
    RecipeArgument,
    check_devices,
    emit,
    prepare_libraries,
)
from kpsvd_tune.recipe import Recipe, load_recipe
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.plan import show_plan


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    without_rows: Annotated[
        bool,
        typer.Option("--without-rows", help="Leave the rows unread; each counts as the longest."),
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a run would do, and what memory, time and money it takes; loads no weights."""
    resolved = load_recipe(
        recipe, overrides or (), look_up=("model", "dataset", "adapter", "evaluation")
    )
    check_devices(gpus, processes)
    prepare_libraries(offline, debug)
    show_plan_of(resolved, gpus, processes, as_json=as_json, reads_rows=not without_rows)


def show_plan_of(
    recipe: Recipe,
    gpus: int | None,
    processes: int | None,
    *,
    as_json: bool,
    reads_rows: bool = True,
) -> None:
    """Make the plan of a recipe and print it, for `plan` and for `train --dry-run`."""
    from kpsvd_tune.estimate import make_plan

    with ConsoleEvents() as events:
        found = make_plan(
            recipe,
            events,
            processes=gpus or processes or 1,
            on_cpu=processes is not None,
            reads_rows=reads_rows,
        )
        emit(found, as_json, show_plan)
