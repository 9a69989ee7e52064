"""The command `train`: decompose, train, score and save the adapter of a recipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpsvd_tune.commands.options import (
    AllowCode,
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
    check_devices,
    emit,
    is_later_rank,
    launch_processes,
    prepare_libraries,
)
from kpsvd_tune.commands.plan import show_plan_of
from kpsvd_tune.errors import WorseThanBaseError
from kpsvd_tune.evaluation.scoring import check_code_execution
from kpsvd_tune.events import Events
from kpsvd_tune.recipe import Recipe, load_recipe
from kpsvd_tune.report import console as view
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.run import UNSCORED

if TYPE_CHECKING:
    from kpsvd_tune.context import RunOptions


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
    allow_code_execution: AllowCode = False,
    sandbox: SandboxOption = "bwrap",
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decompose, train, score and save the adapter of a recipe."""
    # Before the libraries are loaded, which takes seconds of the device as well.
    began = time.monotonic()
    resolved = load_recipe(
        recipe, overrides or (), look_up=("model", "dataset", "adapter", "evaluation")
    )
    tasks = [each.task for each in resolved.evaluation]
    allowed = sandbox if allow_code_execution else None
    if dry_run:
        check_devices(gpus, processes)
        prepare_libraries(offline, debug)
        show_plan_of(resolved, gpus, processes, as_json=as_json)
        return
    check_code_execution(tasks, allowed)
    launch_processes(gpus, processes, accelerate_config)
    prepare_libraries(offline, debug)
    from kpsvd_tune.context import RunOptions
    from kpsvd_tune.training.ending import worse_message
    from kpsvd_tune.training.scored_apart import score_apart

    with ConsoleEvents() as events:
        changes = tuple(allow_change or ())
        options = RunOptions(resume, changes, allow_other_base, allowed, began)
        results = _train(resolved, events, options)
    if UNSCORED in results and is_later_rank():
        # The first rank scores now, and a launcher would end it for a failure of this one.
        return
    typed = {
        "--offline": offline,
        "--debug": debug,
        "--allow-other-base": allow_other_base,
        "--allow-code-execution": allow_code_execution,
        f"--sandbox={sandbox}": allow_code_execution,
    }
    chosen = [option for option, is_typed in typed.items() if is_typed]
    results = score_apart(resolved.output_dir, results, chosen)
    # First the results, which are whole and saved, then what is wrong with them.
    emit(results, as_json, view.show_results)
    if message := worse_message(results, resolved):
        raise WorseThanBaseError(message)


def _train(recipe: Recipe, events: Events, options: RunOptions) -> Mapping[str, Any]:
    """Go through the stages; when this returns the model is gone, and the processes have parted."""
    from kpsvd_tune.training import stages

    with stages.prepare_run(recipe, events, options) as context:
        data = stages.read_data(context)
        if data.start.is_finished:
            return stages.earlier_results(context)
        started = stages.start_model(context, data)
        trained = stages.train_model(context, data, started)
        return stages.finish_run(context, data, started, trained)
