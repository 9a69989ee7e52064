"""Commands that look and change no weight: init-only, its sweeps, and the plan of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.data import prepare, source_names
from kpsvd_tune.data.rows.preflight import model_limits
from kpsvd_tune.decompose import collect_spectra, decompose, report_decomposition
from kpsvd_tune.errors import (
    AdapterError,
    CheckpointError,
    RecipeError,
)
from kpsvd_tune.events import Events
from kpsvd_tune.launch import check_gpus
from kpsvd_tune.models import load_skeleton, load_tokenizer, resolve_model
from kpsvd_tune.phase import Phase, decomposition_cures, watched
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.rank_page import write_rank_report
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.runs import RunDirectory
from kpsvd_tune.runs.ownership import is_run, refuse_inside_run
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.training.length import run_length

KEPT = "finished matrices are kept"


def init_only(
    recipe: Recipe,
    events: Events,
    *,
    offline: bool = False,
    processes: int = 1,
    gpus: int | None = None,
) -> RankReport:
    """Decompose every target, choose the ranks, and write the rank report.

    The factors stay in the spectra cache, from which `train` takes them at once.

    Args:
        recipe: Its model and adapter sections; no dataset is needed.
        events: Told of progress.
        offline: Make no network call.
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
    if recipe.adapter.from_ is not None:
        raise RecipeError(
            "adapter.from: that adapter's ranks stay as they are, and nothing is decomposed; set "
            "it to null to see the ranks of this recipe"
        )
    source = resolve_model(recipe.model.path, recipe.model.revision, offline)
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


def sweep_ranks(
    variants: Mapping[str, Recipe],
    events: Events,
    *,
    offline: bool = False,
    processes: int = 1,
    gpus: int | None = None,
) -> dict[str, RankReport | dict[str, str]]:
    """Apply several rank rules to spectra that are computed once.

    Args:
        variants: A recipe for each value tried; they may differ in adapter.rank only.
        events: Told of progress.
        offline: Make no network call.
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
            resolve_model(widest.model.path, widest.model.revision, offline),
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
    check_gpus(gpus)
    return gpus, "cuda"


def plan(recipe: Recipe, events: Events, *, offline: bool = False) -> dict[str, Any]:
    """Say what `train` would do, without loading weights or writing anything.

    Args:
        recipe: The recipe.
        events: Told of progress.
        offline: Make no network call.
    """
    if recipe.dataset is None:
        raise RecipeError("the recipe has no dataset section, which `train` needs")
    source = resolve_model(recipe.model.path, recipe.model.revision, offline)
    events.stage(f"reading {source_names(recipe.dataset)}")
    skeleton = load_skeleton(source)
    data = prepare(
        recipe.dataset,
        load_tokenizer(source),
        seed=recipe.train.seed,
        offline=offline,
        limits=model_limits(skeleton),
    )
    events.note(data.cache_note)
    events.preflight(data.report)
    adapter = recipe.adapter
    names = target_names(
        skeleton, adapter.target_modules, adapter.exclude_modules, adapter.modules_to_save
    )
    train = recipe.train
    length = run_length(train, len(data.train), len(data.validation))
    if length.faults:
        raise RecipeError("\n".join(length.faults))
    for note in length.notes:
        events.note(note)
    bytes_each = 4 if recipe.model.dtype == "float32" else 2
    num_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    return {
        "model": recipe.model.path,
        "base_parameters": num_parameters,
        "base_model_bytes": num_parameters * bytes_each,
        "target_matrices": len(names),
        "rank_rule": adapter.rank.method,
        "training_rows": len(data.train),
        "validation_rows": len(data.validation),
        "steps": length.num_steps,
        "passes_over_rows": length.passes,
        "rows_per_step": train.batch_size * train.gradient_accumulation,
        "output_dir": recipe.output_dir,
        "output_dir_exists": Path(recipe.output_dir).exists(),
    }
