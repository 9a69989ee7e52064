"""What is trained beside the factors, and what is to be said of it before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.results import Event
from kpsvd_tune.runs.adapter_folder import read_adapter_config
from kpsvd_tune.watch.before import module_warnings, unrestrained_warnings


def whole_warnings(recipe: Recipe, adapter: Path | None) -> Iterator[Event]:
    """The warnings of what a run trains whole.

    `adapter` is the folder of the adapter that it goes on from, whose modules they are then.

    Raises:
        AdapterError: The folder's configuration is not one of KPSVD.
    """
    yield from module_warnings(recipe.adapter.modules_to_save, recipe.model.dtype)
    if recipe.restrain is None:
        return
    if adapter is None:
        names, cure = list(recipe.adapter.modules_to_save), "leave adapter.modules_to_save out"
    else:
        names, cure = _of_adapter(adapter), "go on from an adapter without them (adapter.from)"
    yield from unrestrained_warnings(names, cure)


def _of_adapter(folder: Path) -> list[str]:
    config = read_adapter_config(folder)
    rows = config.trainable_token_indices or {}
    tables = list(rows) if isinstance(rows, dict) else ["the input embedding"]
    return [*(config.modules_to_save or ()), *(f"rows of {table}" for table in tables)]
