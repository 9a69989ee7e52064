"""What `train` would do: `train --dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.data import prepare, source_names
from kpsvd_tune.data.rows.preflight import model_limits
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.events import Events
from kpsvd_tune.models import load_skeleton, load_tokenizer, resolve_model
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.training.schedule import run_length


def plan(recipe: Recipe, events: Events) -> dict[str, Any]:
    """Say what `train` would do, without loading weights or writing anything."""
    if recipe.dataset is None:
        raise RecipeError("the recipe has no dataset section, which `train` needs")
    source = resolve_model(recipe.model.path, recipe.model.revision)
    events.stage(f"reading {source_names(recipe.dataset)}")
    skeleton = load_skeleton(source)
    data = prepare(
        recipe.dataset,
        load_tokenizer(source),
        seed=recipe.train.seed,
        progress=lambda done, total: events.advance("tokenising", done, total),
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
