"""How an adapter was trained, as its card tells it: what the run or the adapter's folder keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from kpsvd_tune.data import source_names
from kpsvd_tune.errors import KpsvdTuneError, some_of
from kpsvd_tune.recipe import Recipe, load_recipe
from kpsvd_tune.report.card import Training, adapter_name
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.runs.adapter_folder import AdapterFile, read_adapter_config
from kpsvd_tune.runs.ownership import is_run
from kpsvd_tune.storage.json_files import read_json

# Where run.json keeps how many rows were trained and held out.
ROWS_KEY = "rows"


def describe_training(
    adapter: str,
    recipe: Recipe,
    ranks: RankReport,
    record: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Training:
    """What a run tells of its training.

    `adapter` is the adapter's folder, `record` the content of run.json, `results` that of
    results.json.
    """
    settings = [
        ("ranks", _spread([layer.rank for layer in ranks.layers], _shape(recipe))),
        ("rank rule", _rule(recipe, ranks)),
        ("trained", _trained(ranks)),
        *_data(recipe, record),
        ("settings", _settings(recipe)),
    ]
    return Training(
        adapter=adapter_name(adapter),
        form=ranks.form,
        is_random=ranks.frozen_seed is not None,
        settings=tuple(settings),
        base_files=record.get("identity", {}).get("base"),
        results=results,
    )


def training_of(folder: Path) -> Training:
    """What is known of the training of an adapter in a folder.

    That is all where it lies in its run; elsewhere what its configuration says. What cannot be
    read, as it is damaged or of an older version, is left out.
    """
    run = folder.parent
    if folder.name == "adapter" and is_run(run):
        with suppress(KpsvdTuneError):
            return describe_training(
                str(folder),
                load_recipe(run / "recipe.yaml", of_run=True),
                RankReport.from_dict(read_json(run / "init" / "rank_report.json")),
                read_json(run / "run.json"),
                read_json(run / "results.json"),
            )
    config = read_adapter_config(folder)
    return Training(
        adapter=adapter_name(str(folder)),
        form=config.form,
        is_random=config.frozen_seed is not None,
        settings=_from_config(config),
        base_files=config.base_files,
    )


def _from_config(config: AdapterFile) -> tuple[tuple[str, str], ...]:
    if not config.layers:
        return ()
    return (("ranks", _spread([layer.rank for layer in config.layers.values()], "")),)


def _spread(ranks: Sequence[int], factors: str) -> str:
    """The ranks of all target matrices in a few words."""
    adapted = sorted(rank for rank in ranks if rank > 0)
    if not adapted:
        return f"0 in all of {len(ranks)} target matrices"
    least, most = adapted[0], adapted[-1]
    span = str(most) if least == most else f"{least} to {most}, median {median(adapted):g},"
    matrices = f"{len(adapted)} of {len(ranks)} target matrices"
    return f"{span} in {matrices}{factors}"


def _shape(recipe: Recipe) -> str:
    shape, size = recipe.adapter.factor_shape, recipe.adapter.factor_size
    if size is not None:
        return f", trained factors of {size}"
    named = shape if isinstance(shape, str) else f"n = {shape['n']}, p = {shape['p']}"
    return f", factors {named}"


def _rule(recipe: Recipe, ranks: RankReport) -> str:
    rank = recipe.adapter.rank
    # In a recipe the energy may be auto; the report says what that came to.
    energy = f", energy {ranks.rule.get('energy', rank.energy)}" if "energy" in rank.method else ""
    budget = f", budget {rank.budget:,}" if rank.budget else ""
    return f"{rank.method}{energy}, {rank.min} to {rank.max}{budget}"


def _trained(ranks: RankReport) -> str:
    trained = int(ranks.totals["trainable_parameters"])
    frozen = ranks.stored_parameters - trained
    beside = (
        f"the file holds {frozen:,} frozen ones beside them, Kronecker factors"
        if frozen
        else "a seed in adapter_config.json gives the frozen Kronecker factors"
    )
    whole = ranks.trained_whole
    more = f"; {sum(whole.values()):,} more of {some_of([*whole])}, trained whole" if whole else ""
    return f"{trained:,} parameters (form {ranks.form}); {beside}{more}"


def _data(recipe: Recipe, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    if recipe.dataset is None:
        return []
    found = [("data", source_names(recipe.dataset))]
    rows = record.get(ROWS_KEY)
    if isinstance(rows, Mapping):
        found.append(("rows", f"{rows['train']:,} trained, {rows['validation']:,} held out"))
    if digest := record.get("identity", {}).get("dataset"):
        found.append(("hash of the rows as token ids", f"sha256 {digest}"))
    return found


def _quantised(recipe: Recipe) -> str:
    kind = recipe.model.quantization
    return f", its linear layers in {kind}" if kind else ""


def _settings(recipe: Recipe) -> str:
    train = recipe.train
    accumulated = f" x {train.gradient_accumulation}" if train.gradient_accumulation > 1 else ""
    length = f"rows of at most {recipe.dataset.max_length} tokens" if recipe.dataset else ""
    return ", ".join(
        filter(
            None,
            [
                f"optimiser {train.optimizer}",
                f"learning rate {train.learning_rate:g} ({train.scheduler})",
                f"weight decay {train.weight_decay:g}" if train.weight_decay else "",
                f"{train.batch_size}{accumulated} rows a step in each process",
                length,
                f"base in {recipe.model.dtype}" + _quantised(recipe),
                f"mixed precision {train.precision}",
                f"seed {train.seed}",
            ],
        )
    )
