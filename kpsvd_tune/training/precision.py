"""Settles `train.precision: auto` and `model.dtype: auto` for the machine, and keeps the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kpsvd_tune.hardware.bf16 import Bf16, bf16_speed
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.storage.json_files import read_json

# Where run.json keeps what was chosen and why.
PRECISION_KEY = "precision"
AUTO = "auto"
# The base is kept in the type that its products are taken in anyway: wider weights would be rounded
# at every product, narrower ones would be multiplied where that is slow.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
_KEYS = ("train.precision", "model.dtype")


@dataclass(frozen=True)
class Settled:
    """A recipe without `auto` in precision and dtype."""

    recipe: Recipe
    note: str | None = None  # what was chosen, to be told; None where nothing was left to choose
    about: Mapping[str, Any] | None = None  # the same for run.json


def going_on(recipe: Recipe) -> Mapping[str, Any] | None:
    """The content of run.json where the recipe's folder holds a run that goes on or is finished.

    None too where nothing is left to choose.
    """
    run = RunDirectory(recipe.output_dir)
    if not asks_for_auto(recipe) or not run.run_file.exists():
        return None
    record = read_json(run.run_file)
    return record if run.holds_checkpoint() or record.get("status") == "finished" else None


def asks_for_auto(recipe: Recipe) -> bool:
    """Whether precision or dtype are left to the machine."""
    return AUTO in (recipe.train.precision, recipe.model.dtype)


def settle_precision(
    recipe: Recipe, device: torch.device, record: Mapping[str, Any] | None = None
) -> Settled:
    """Put what a machine computes fast in place of `auto`; other values stay.

    Precision is bf16 where the device multiplies it at full speed, else no. The base is loaded in
    the type that the precision multiplies. A run that goes on keeps what it began with.

    Args:
        recipe: The recipe as it was read.
        device: The device that the main process computes on.
        record: Content of the run's run.json where a run goes on.
    """
    if not asks_for_auto(recipe):
        return Settled(recipe)
    asked = dict(zip(_KEYS, (recipe.train.precision, recipe.model.dtype), strict=True))
    # What an explicit precision leaves open follows from it alone.
    found = bf16_speed(device) if recipe.train.precision == AUTO else None
    chosen = _chosen(asked, found)
    known = _known(record)
    if known is None:
        settled = _with(recipe, chosen)
        why = (
            f"it follows train.precision: {recipe.train.precision}" if found is None else found.why
        )
        left = {key: chosen[key] for key in _KEYS if asked[key] == AUTO}
        about = {
            "asked": asked,
            "chosen": chosen,
            "why": why,
            "ratio": None if found is None else found.ratio,
        }
        return Settled(settled, f"{_listed(left)} chosen for auto: {why}", about)
    kept = {key: known[key] if asked[key] == AUTO else asked[key] for key in _KEYS}
    others = {key: chosen[key] for key in _KEYS if chosen[key] != kept[key]}
    left = {key: kept[key] for key in _KEYS if asked[key] == AUTO}
    note = f"{_listed(left)} chosen for auto when this run began, and kept"
    if others:
        why = "" if found is None else f": {found.why}"
        note += f"; a new run would take {_named(others)} on this machine{why}"
    return Settled(_with(recipe, kept), note)


def _chosen(asked: Mapping[str, str], found: Bf16 | None) -> dict[str, str]:
    precision, dtype = (asked[key] for key in _KEYS)
    if found is not None:
        precision = "bf16" if found.is_fast else "no"
    return dict(
        zip(_KEYS, (precision, _DTYPES[precision] if dtype == AUTO else dtype), strict=True)
    )


def _known(record: Mapping[str, Any] | None) -> dict[str, str] | None:
    """What a run began with; None where there is none to go on, or it does not say."""
    recipe = (record or {}).get("identity", {}).get("recipe", {})
    found = {key: recipe.get(key.split(".")[0], {}).get(key.split(".")[1]) for key in _KEYS}
    return None if None in found.values() else found


def _with(recipe: Recipe, values: Mapping[str, str]) -> Recipe:
    precision, dtype = (values[key] for key in _KEYS)
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"precision": precision}),
            "model": recipe.model.model_copy(update={"dtype": dtype}),
        }
    )


def _named(values: Mapping[str, str]) -> str:
    return " and ".join(f"{key}: {value}" for key, value in values.items())


def _listed(values: Mapping[str, str]) -> str:
    return f"{_named(values)} {'were' if len(values) > 1 else 'was'}"
