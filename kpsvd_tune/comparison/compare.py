"""The command `compare`: the same training for every method, trial by trial, and the verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.comparison.baselines import Sizes
from kpsvd_tune.comparison.methods import Method
from kpsvd_tune.comparison.plan import Grid, next_trials, num_left
from kpsvd_tune.comparison.setup import Setups
from kpsvd_tune.comparison.trial import Material
from kpsvd_tune.comparison.trial_log import (
    COMPARISON,
    RESULTS,
    append_row,
    check_schedule,
    open_results,
)
from kpsvd_tune.comparison.verdict import compare_rows
from kpsvd_tune.comparison.workers import Workers
from kpsvd_tune.data import TokenizedRow, prepare, source_names
from kpsvd_tune.data.rows.preflight import ModelLimits, model_limits, pad_token_id
from kpsvd_tune.data.rows.store import num_shared
from kpsvd_tune.errors import AdapterError, DataError, InputError, RecipeError, StoppedBySignal
from kpsvd_tune.events import Events
from kpsvd_tune.models import (
    ModelSource,
    WeightReader,
    base_fingerprint,
    load_skeleton,
    load_tokenizer,
    resolve_model,
)
from kpsvd_tune.phase import data_cures, watched
from kpsvd_tune.recipe import AdapterRecipe, Recipe
from kpsvd_tune.report.comparison import Comparison, Trial, TrialRow
from kpsvd_tune.report.comparison_page import comparison_page
from kpsvd_tune.report.pages import write_page
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.ownership import refuse_foreign, refuse_inside_run
from kpsvd_tune.storage.durable import replace_file
from kpsvd_tune.storage.json_files import read_bytes, to_json
from kpsvd_tune.training.schedule import num_warmup_steps, run_length


class Watcher(Protocol):
    """What a comparison tells whoever started it, besides events."""

    def begin(self, rows: Sequence[TrialRow], num_left: int, jobs: int) -> None:
        """Show the trials that are done already, and how many are to come, ``jobs`` at a time."""

    def stepped(self, trial: Trial, step: int, total: int, loss: float) -> None:
        """Report one step of a trial that runs."""

    def finished(self, row: TrialRow, num_left: int) -> None:
        """Report a trial that is done, and how many are to come."""


def compare(
    recipe: Recipe,
    recipes: Mapping[str, Recipe],
    methods: Sequence[Method],
    grid: Grid,
    events: Events,
    watcher: Watcher,
    *,
    jobs: int = 1,
) -> Comparison:
    """Run every trial that is not done yet, and draw the verdict.

    Args:
        recipe: What all methods share.
        recipes: The recipe of each method by its name, which differs in its adapter section.
        methods: The methods of the grid.
        grid: Each method's budgets and rates, and the seeds.
        events: Told of stages and progress.
        watcher: Told of trials.
        jobs: Trials at a time; on GPUs each takes its own.

    Returns:
        The verdict, also written to comparison.json and comparison.html in the recipe's
        output_dir, beside results.jsonl with a row a trial.

    Raises:
        StoppedBySignal: SIGINT or SIGTERM; running trials were saved.
        KpsvdTuneError: See :mod:`kpsvd_tune.errors`.
    """
    _check(recipe)
    budgets = sorted({budget for each in grid.entries for budget in each.budgets})
    run = RunDirectory(recipe.output_dir)
    if not (run.path / COMPARISON).exists():
        # The record of a comparison is the first file of its folder.
        refuse_inside_run(run.path, "output_dir")
        refuse_foreign(run.path, ())
    with watched() as phase, run.lock():
        phase.enter("preparing the comparison", data_cures(recipe), "finished trials are kept")
        source = resolve_model(recipe.model.path, recipe.model.revision)
        skeleton = load_skeleton(source)
        material, shared = _material(recipe, source, skeleton, events)
        num_steps = _num_steps(recipe, grid, material, events)
        sizes = {method.name: _sizes(method, recipe, source, skeleton) for method in methods}
        kind = skeleton.config.model_type
        plan = Setups(recipe, recipes, methods, sizes, kind, run.path, shared)
        plan.prepare(source, budgets, events)
        for note in plan.notes:
            events.note(note)
        if recipe.restrain is not None:
            events.note("restrain is for `train`: the updates of the trials stay as trained")
        if grid.plan != "done":
            grid = grid.with_budgets(plan.budgets)
        rows = open_results(run.path, shared, plan.adapters())
        if rows and next_trials(grid, rows) and num_warmup_steps(recipe.train, num_steps):
            check_schedule(run.path)
        base: Mapping[str, float | None] = {}
        try:
            with Workers(material, recipe, jobs, watcher.stepped) as workers:
                base = workers.base(run.path / "base.json", events)
                watcher.begin(rows, num_left(grid, rows), jobs)
                while pending := next_trials(grid, rows):
                    for row in workers.rows([plan.setup(trial, base) for trial in pending]):
                        append_row(run.path, row)
                        rows.append(row)
                        watcher.finished(row, num_left(grid, rows))
        except StoppedBySignal:
            # The verdict so far, for whoever wants to look at it now.
            with suppress(InputError):
                _conclude(recipe, grid, rows, base, jobs, plan.notes, events)
            raise
        return _conclude(recipe, grid, rows, base, jobs, plan.notes, events)


def _material(
    recipe: Recipe, source: ModelSource, skeleton: Any, events: Events
) -> tuple[Material, dict[str, Any]]:
    """What all trials share, and what must be equal for new trials to be comparable with others."""
    assert recipe.dataset is not None
    tokenizer, limits = load_tokenizer(source), model_limits(skeleton)
    events.stage(f"reading {source_names(recipe.dataset)}")
    data = prepare(recipe.dataset, tokenizer, seed=recipe.train.seed, limits=limits)
    events.note(data.cache_note)
    events.preflight(data.report)
    if not data.validation:
        raise DataError(
            "compare judges by held-out rows and dataset.validation is 0; set it to a share, "
            "a number of rows or a file"
        )
    test, test_sha256 = _test_rows(recipe, tokenizer, limits)
    if known := num_shared(test, data.train):
        events.note(
            f"KNOWN ROWS: {known} of the {len(test)} rows of compare.test are trained on, so "
            "the test loss is partly one of known rows: take them out of one of the two"
        )
    forgetting, text_sha256 = _forgetting_text(recipe)
    shared = {
        "recipe": _fixed_part(recipe),
        "base": base_fingerprint(source),
        "dataset": data.sha256,
        "test": test_sha256,
        "forgetting": text_sha256,
    }
    pad = pad_token_id(tokenizer)
    return Material(source, data.train, data.validation, test, forgetting, pad), shared


def _num_steps(recipe: Recipe, grid: Grid, material: Material, events: Events) -> int:
    """Optimiser steps of a trial, where the recipe's steps and validations fit together."""
    length = run_length(recipe.train, len(material.train), len(material.validation))
    if length.faults and grid.plan != "done":
        raise RecipeError("\n".join(length.faults))
    for note in length.notes:
        events.note(note)
    for warning in length.warnings:
        events.tell(warning)
    return length.num_steps


def _sizes(method: Method, recipe: Recipe, source: ModelSource, skeleton: Any) -> Sizes:
    """(out_features, in_features) of each module that a method goes on."""
    adapter, own = recipe.adapter, method.modules
    targets = adapter.target_modules if own is None else own
    try:
        names = target_names(skeleton, targets, adapter.exclude_modules, adapter.modules_to_save)
    except AdapterError as error:
        if own is None:
            raise
        raise InputError(f"--methods {method.name}: {error}") from error
    reader = WeightReader(source, names, skeleton)
    sizes = {name: reader.size(name) for name in names}
    reader.close()
    return sizes


def _conclude(
    recipe: Recipe,
    grid: Grid,
    rows: Sequence[TrialRow],
    base: Mapping[str, float | None],
    jobs: int,
    notes: Sequence[str],
    events: Events,
) -> Comparison:
    """Write the verdict on the trials of the grid, also where more of them are to come."""
    folder, train = Path(recipe.output_dir), recipe.train
    chosen = [row for row in rows if grid.holds(row)]
    steps = max((len(row.losses) for row in chosen), default=0)
    verdict = compare_rows(
        chosen,
        model=recipe.model.path,
        steps=steps,
        base=base,
        num_warmup=num_warmup_steps(train, steps),
        max_grad_norm=train.max_grad_norm,
        price_per_hour=recipe.compare.price_per_hour,
        currency=recipe.compare.currency,
        num_missing=len(next_trials(grid, rows)),
        jobs=jobs,
        notes=notes,
    )
    replace_file(folder / "comparison.json", to_json(verdict.to_dict()))
    page = folder / "comparison.html"
    fault = write_page(page, lambda: comparison_page(verdict, chosen))
    events.note(fault or f"written: {page}, comparison.json and {RESULTS}")
    return verdict


def _check(recipe: Recipe) -> None:
    if recipe.dataset is None:
        raise RecipeError("the recipe has no dataset section, which `compare` needs")
    if recipe.adapter.modules_to_save:
        raise RecipeError(
            "adapter.modules_to_save: modules trained whole would count against no budget; set it "
            "to [] to compare adapters"
        )
    if recipe.adapter.from_ is not None:
        raise RecipeError(
            "adapter.from: methods are compared from their own starts, not from a trained adapter; "
            "set it to null"
        )


def _test_rows(
    recipe: Recipe, tokenizer: Any, limits: ModelLimits
) -> tuple[Sequence[TokenizedRow], str | None]:
    """Rows that no choice looks at, and their hash."""
    if recipe.compare.test is None:
        return (), None
    assert recipe.dataset is not None
    dataset = recipe.dataset.model_copy(
        update={"path": recipe.compare.test, "name": None, "split": "train", "validation": 0}
    )
    found = prepare(dataset, tokenizer, seed=0, limits=limits, keeps_template=True)
    return found.train, found.sha256


def _forgetting_text(recipe: Recipe) -> tuple[Path | None, str | None]:
    """The text of another kind, and its hash."""
    if recipe.compare.forgetting is None:
        return None, None
    file = Path(recipe.compare.forgetting)
    try:
        content = read_bytes(file)
        content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"compare.forgetting: {file} cannot be read as UTF-8 text ({error}); name a text file, "
            "or set it to null"
        ) from error
    return file, hashlib.sha256(content).hexdigest()


def _fixed_part(recipe: Recipe) -> dict[str, Any]:
    """What must be equal in all trials; methods, budgets, rates and seeds may be added later."""
    kept = {"target_modules", "exclude_modules", "modules_to_save", "dropout"}
    return recipe.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(("output_dir", "tracking", "evaluation"), True),
            "adapter": AdapterRecipe.model_fields.keys() - kept,
            "train": {"learning_rate", "seed"},
            "compare": {"price_per_hour", "currency"},
        },
    )
