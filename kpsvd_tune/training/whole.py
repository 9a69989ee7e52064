"""What is trained beside the factors, and what is to be said of it before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.results import Event
from kpsvd_tune.runs.adapter_folder import read_adapter_config
from kpsvd_tune.watch.before import module_warnings, unrestrained_warnings


def whole_warnings(recipe: Recipe, adapter: Path | None) -> Iterator[Event]:
    """The warnings of what a run trains whole.

    `adapter` is the folder of the adapter that it goes on from, whose modules they are then.

    Raises:
        AdapterError: The folder's configuration is not one of KPSVD.
        RecipeError: The base is loaded in float16, where training would ruin modules.
    """
    if adapter is None:
        modules, rows = list(recipe.adapter.modules_to_save), list[str]()
        where, cure = "adapter.modules_to_save", "leave adapter.modules_to_save out"
    else:
        modules, rows = _of_adapter(adapter)
        where, cure = str(adapter), "go on from an adapter without them (adapter.from)"
    if modules and recipe.model.dtype == "float16":
        raise RecipeError(
            f"{where}: {', '.join(modules)} would be trained in the float16 of the base, in which "
            "the squares of small gradients that an optimiser keeps are 0, so that its steps have "
            "no bound; expected model.dtype: float32 or bfloat16 where modules are trained whole"
        )
    yield from module_warnings(modules, recipe.model.dtype)
    if recipe.restrain is not None:
        yield from unrestrained_warnings([*modules, *rows], cure)


def _of_adapter(folder: Path) -> tuple[list[str], list[str]]:
    """Modules that an adapter trains whole, and embeddings of which it trains rows, in words."""
    config = read_adapter_config(folder)
    rows = config.trainable_token_indices or {}
    tables = list(rows) if isinstance(rows, dict) else ["the input embedding"]
    return list(config.modules_to_save or ()), [f"rows of {table}" for table in tables]
