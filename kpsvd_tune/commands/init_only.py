"""The command `init-only`: the ranks of a recipe, without data and without training."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kpsvd_tune.commands.options import (
    Debug,
    DryRun,
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
from kpsvd_tune.errors import CheckpointError, InputError, RecipeError
from kpsvd_tune.events import Events
from kpsvd_tune.phase import Phase, decomposition_cures, watched
from kpsvd_tune.recipe import Recipe, load_recipe
from kpsvd_tune.report import console as view
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.report.work import show_work
from kpsvd_tune.runs.ownership import is_run, refuse_inside_run
from kpsvd_tune.storage.disk import explained


def init_only(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B,C", help="Show the totals for several values of a key."),
    ] = None,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decompose and choose the ranks, without data and without training."""
    resolved = load_recipe(recipe, overrides or (), look_up=("model",))
    check_devices(gpus, processes)
    prepare_libraries(offline, debug)
    if dry_run:
        if sweep:
            raise InputError("--dry-run plans one recipe: leave --sweep out")
        from kpsvd_tune.estimate.verbs import decomposition_work

        work = decomposition_work(resolved, processes=gpus or processes or 1, on_gpu=bool(gpus))
        emit(work, as_json, show_work)
        return
    workers = {"processes": gpus or processes or 1, "device": "cuda" if gpus else "cpu"}
    with ConsoleEvents() as events:
        if sweep:
            variants = _variants(recipe, overrides or (), sweep)
            with _together(workers) as (phase, run):
                swept = run(lambda: _sweep(variants, workers, phase, events))
            emit(swept, as_json, view.show_sweep)
            return
        with _together(workers) as (phase, run):
            report: RankReport = run(lambda: _decompose(resolved, workers, phase, events))
        emit(report, as_json, view.show_ranks)
        init = Path(resolved.output_dir) / "init"
        page = init / "rank_report.html"
        look = f"; open {page} in a browser" if page.exists() else ""
        events.note(f"written: {init}/rank_report.json and .csv{look}")


@contextmanager
def _together(
    workers: dict[str, Any],
) -> Iterator[tuple[Phase, Callable[[Callable[[], Any]], Any]]]:
    """Gather the processes of a launch, where there is one, and change `workers` to them.

    Gives the phase, and what has the main process do some work while the others help it.
    """
    from kpsvd_tune.decompose.launched import Helper
    from kpsvd_tune.hardware.devices import decomposing_device
    from kpsvd_tune.processes import device, end_processes, name_lost_process, on_main_process

    number = int(os.environ.get("WORLD_SIZE", "1"))
    with watched() as phase, ExitStack() as stack:
        if number > 1:
            if workers["processes"] > 1:
                raise InputError(
                    f"{workers['processes']} worker processes were asked for, and a launcher has "
                    f"started {number} ranks, which share the matrices; leave --processes and "
                    "--gpus out"
                )
            phase.enter("meeting the other ranks")
            stack.callback(end_processes)
            place = str(decomposing_device(device()))
            workers |= {"device": place, "in_launch": True}
            phase.enter("decomposing the base model")
            lost = name_lost_process(lambda: phase.name, kept=lambda: "Finished matrices are kept")
            stack.enter_context(lost)
        helper = Helper(workers["device"])
        yield phase, lambda work: on_main_process(work, helper)


def _decompose(
    recipe: Recipe, workers: Mapping[str, Any], phase: Phase, events: Events
) -> RankReport:
    """Decompose every target, choose the ranks, and write the rank report to init/.

    The factors stay in the spectra cache, from which `train` takes them at once.
    """
    from kpsvd_tune.decompose import decompose
    from kpsvd_tune.report.rank_page import write_rank_report
    from kpsvd_tune.runs.directory import RunDirectory

    if recipe.adapter.from_ is not None:
        raise RecipeError(
            "adapter.from: that adapter's ranks stay as they are, and nothing is decomposed; set "
            "it to null to see the ranks of this recipe"
        )
    run = RunDirectory(recipe.output_dir)
    if is_run(run.path):
        # A run that goes on reads init/ back: other ranks there would not fit its factors.
        raise CheckpointError(
            f"{run.path} holds a training run, and its ranks stay as they are; `kpsvd-tune report "
            f"{shlex.quote(str(run.path))}` shows them. To try other ranks, choose another "
            "output_dir"
        )
    refuse_inside_run(run.path, "output_dir")
    run.check_ours()
    with run.lock():
        report: RankReport = _run(decompose, recipe, phase, workers, events).report
        if recipe.adapter.rank.energy == "auto":
            stands_in = f"here {report.rule['energy']:g} stands in"
            events.note(f"adapter.rank.energy: auto is chosen by `train`; {stands_in}")
        with explained(f"write {run.init}"):
            missing_page = write_rank_report(report, run.init)
    if missing_page is not None:
        events.note(missing_page)
    return report


def _sweep(
    variants: Mapping[str, Recipe], workers: Mapping[str, Any], phase: Phase, events: Events
) -> dict[str, RankReport | dict[str, str]]:
    """Decompose once and apply the rank rule of each variant."""
    from kpsvd_tune.decompose import collect_spectra
    from kpsvd_tune.decompose.sweep import check_sweep, sweep_ranks

    widest = check_sweep(variants)
    spectra = _run(collect_spectra, widest, phase, workers, events)
    return sweep_ranks(spectra, variants, events)


def _run(
    work: Callable[..., Any],
    recipe: Recipe,
    phase: Phase,
    workers: Mapping[str, Any],
    events: Events,
) -> Any:
    """Decompose the base model by one of the functions for it, and say how it goes."""
    from kpsvd_tune.decompose import report_decomposition
    from kpsvd_tune.models import resolve_model

    phase.enter(
        "decomposing the base model", decomposition_cures(recipe), "finished matrices are kept"
    )
    source = resolve_model(recipe.model.path, recipe.model.revision)
    events.stage(f"decomposing {recipe.model.path}")
    progress, seed = report_decomposition(events), recipe.train.seed
    found = work(source, recipe.adapter, seed=seed, progress=progress, **workers)
    events.end_progress()
    for note in found.notes:
        events.note(note)
    return found


def _variants(recipe: str, overrides: Sequence[str], sweep: list[str]) -> dict[str, Recipe]:
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
