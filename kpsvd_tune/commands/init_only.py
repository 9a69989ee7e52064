"""The command `init-only`: the ranks of a recipe, without data and without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from kpsvd_tune.errors import AdapterError, CheckpointError, InputError, RecipeError
from kpsvd_tune.events import Events
from kpsvd_tune.recipe import Recipe, load_recipe
from kpsvd_tune.report import console as view
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.results import RankReport


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
    with ConsoleEvents() as events:
        if sweep:
            variants = _sweep(recipe, overrides or (), sweep)
            emit(
                _sweep_ranks(variants, events, processes=processes or 1, gpus=gpus),
                as_json,
                view.show_sweep,
            )
            return
        report = _decompose(resolved, events, processes=processes or 1, gpus=gpus)
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


KEPT = "finished matrices are kept"


def _decompose(
    recipe: Recipe,
    events: Events,
    *,
    processes: int = 1,
    gpus: int | None = None,
) -> RankReport:
    """Decompose every target, choose the ranks, and write the rank report.

    The factors stay in the spectra cache, from which `train` takes them at once.

    Args:
        recipe: Its model and adapter sections; no dataset is needed.
        events: Told of progress.
        processes: Worker processes for the decomposition.
        gpus: One worker on each of that many GPUs instead; None computes on the CPU.

    Returns:
        The rank report, also written to init/rank_report.json, .csv and .html.

    Raises:
        RecipeError: The recipe goes on from an adapter, whose ranks are chosen.
        CheckpointError: The folder holds a training run, whose ranks must stay as they are.
        InputError: There are fewer GPUs.
        StoppedBySignal: SIGINT or SIGTERM; finished matrices are in the cache.
    """
    from kpsvd_tune.decompose import decompose, report_decomposition
    from kpsvd_tune.models import resolve_model
    from kpsvd_tune.phase import Phase, decomposition_cures, watched
    from kpsvd_tune.report.rank_page import write_rank_report
    from kpsvd_tune.runs.directory import RunDirectory
    from kpsvd_tune.runs.ownership import is_run, refuse_inside_run
    from kpsvd_tune.storage.disk import explained

    if recipe.adapter.from_ is not None:
        raise RecipeError(
            "adapter.from: that adapter's ranks stay as they are, and nothing is decomposed; set "
            "it to null to see the ranks of this recipe"
        )
    source = resolve_model(recipe.model.path, recipe.model.revision)
    processes, device = _workers(processes, gpus)
    run = RunDirectory(recipe.output_dir)
    if is_run(run.path):
        # A run that goes on reads init/ back: other ranks there would not fit its factors.
        raise CheckpointError(
            f"{run.path} holds a training run, and its ranks stay as they are; `kpsvd-tune report "
            f"{run.path}` shows them. To try other ranks, choose another output_dir"
        )
    phase = Phase()
    phase.enter("decomposing the base model", decomposition_cures(recipe), KEPT)
    refuse_inside_run(run.path, "output_dir")
    run.check_ours()
    with run.lock(), watched(phase):
        events.stage(f"decomposing {recipe.model.path}")
        decomposition = decompose(
            source,
            recipe.adapter,
            seed=recipe.train.seed,
            processes=processes,
            device=device,
            progress=report_decomposition(events),
        )
        events.end_progress()
        for note in decomposition.notes:
            events.note(note)
        if recipe.adapter.rank.energy == "auto":
            default = decomposition.report.rule["energy"]
            events.note(
                f"adapter.rank.energy: auto is chosen by `train`; here {default:g} stands in"
            )
        with explained(f"write {run.init}"):
            missing_page = write_rank_report(decomposition.report, run.init)
    if missing_page is not None:
        events.note(missing_page)
    return decomposition.report


def _sweep_ranks(
    variants: Mapping[str, Recipe],
    events: Events,
    *,
    processes: int = 1,
    gpus: int | None = None,
) -> dict[str, RankReport | dict[str, str]]:
    """Apply several rank rules to spectra that are computed once.

    Args:
        variants: A recipe for each value tried; they may differ in adapter.rank only.
        events: Told of progress.
        processes: Worker processes for the decomposition.
        gpus: One worker on each of that many GPUs instead; None computes on the CPU.

    Returns:
        For each value its report, or ``{"error": reason}`` where the rule cannot be met.

    Raises:
        RecipeError: The swept key is not one of adapter.rank, or is its tolerance.
        AdapterError: No value can be met.
        InputError: There are fewer GPUs.
        StoppedBySignal: SIGINT or SIGTERM; finished matrices are in the cache.
    """
    from kpsvd_tune.decompose import collect_spectra, report_decomposition
    from kpsvd_tune.models import resolve_model
    from kpsvd_tune.phase import Phase, decomposition_cures, watched

    recipes = list(variants.values())
    widest = max(recipes, key=lambda recipe: recipe.adapter.rank.window)
    for setting in variants:
        key = setting.partition("=")[0].strip()
        if not key.startswith("adapter.rank."):
            raise RecipeError(f"--sweep {setting}: only keys of adapter.rank can be swept")
        if key == "adapter.rank.tolerance":
            raise RecipeError(f"--sweep {setting}: one set of spectra has one tolerance")
    processes, device = _workers(processes, gpus)
    events.stage(f"decomposing {widest.model.path}")
    phase = Phase()
    phase.enter("decomposing the base model", decomposition_cures(widest), KEPT)
    with watched(phase):
        spectra = collect_spectra(
            resolve_model(widest.model.path, widest.model.revision),
            widest.adapter,
            seed=widest.train.seed,
            processes=processes,
            device=device,
            progress=report_decomposition(events),
        )
    events.end_progress()
    for note in spectra.notes:
        events.note(note)
    if any(recipe.adapter.rank.energy == "auto" for recipe in recipes):
        events.note("adapter.rank.energy: auto is chosen by `train`; here the default stands in")
    found: dict[str, RankReport | dict[str, str]] = {}
    refusals: list[AdapterError] = []
    for setting, recipe in variants.items():
        try:
            found[setting] = spectra.report(recipe.adapter.rank)
        except AdapterError as error:
            # The others are worth showing.
            found[setting] = {"error": str(error)}
            refusals.append(error)
    if len(refusals) == len(found):
        raise refusals[0]
    ranks = [
        tuple(layer.rank for layer in report.layers)
        for report in found.values()
        if isinstance(report, RankReport)
    ]
    if len(ranks) > 1 and len(set(ranks)) == 1:
        rule = widest.adapter.rank
        events.note(
            f"every value gives the same ranks: with method {rule.method}, max {rule.max} and "
            f"budget {rule.budget} the key swept decides nothing"
        )
    return found


def _workers(processes: int, gpus: int | None) -> tuple[int, str]:
    """How many workers decompose, and on what."""
    if gpus is None:
        return processes, "cpu"
    from kpsvd_tune.launch import check_gpus

    check_gpus(gpus)
    return gpus, "cuda"
