"""Tells runs apart: compares the settings a run began with, key by key, with those of now."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from kpsvd_tune.recipe import Recipe, value_to_yaml
from kpsvd_tune.recipe.removed import had_no_effect
from kpsvd_tune.report.run_files import KEPT_TEXT_KEY

# Keys that change what is shown or kept, and nothing of what is computed. `output_dir` may differ
# because a run's folder may be moved; `evaluation` comes after training and scores what it finds,
# and `compare` belongs to another command, which knows its files by their hashes.
HARMLESS = (
    "recipe.tracking",
    "recipe.output_dir",
    "recipe.evaluation",
    "recipe.compare",
    "recipe.train.log_every",
    "recipe.train.save_every",
    "recipe.train.keep_checkpoints",
    "recipe.train.num_workers",
    # Where weights lie until they are used: they compute on the same device.
    "recipe.model.device_map",
    # A run that memory ended goes on with it: rows and updates of a step are the same.
    "recipe.train.on_oom",
)
# Keys that made the frozen factors, which all that a checkpoint holds belongs to: a run that went
# on under other values would have the old factors all the same. So does `adapter`, the hash of what
# `adapter.from` names; that path may change.
FIXED = (
    "adapter.target_modules",
    "adapter.exclude_modules",
    "adapter.form",
    "adapter.factor_shape",
    "adapter.factor_size",
    "adapter.init",
    "adapter.rank",
    "adapter.modules_to_save",
)
# The key with which the rows of a step stay, and the bytes do not (training/global_batch.py).
PROCESSES = "num_processes"
NOT_THE_SAME_BYTES = (
    "not byte for byte the run it would have been: sums are rounded in another order (about 1e-5 "
    "of a loss in float32), and random numbers, as of dropout, are drawn anew in every process"
)
_ABSENT = "(not set)"
Change = tuple[Any, Any]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Change]:
    """Settings that differ and matter, by dotted key, each with its old and new value.

    Keys of the recipe are given as the user writes them, without a leading `recipe.`. A key that
    the recipe did not have yet when the run began counts as its default, which keeps to what was
    done before there was the key; one that it no longer has is left out at its old default. The
    text of `restrain` is compared where both name its hash, which earlier versions did not keep.
    """
    before = {key: value for key, value in _flat(old) if not had_no_effect(key, value)}
    after = dict(_flat(new))
    before |= {key: value for key, value in _defaults().items() if key in after.keys() - before}
    if KEPT_TEXT_KEY not in before.keys() & after.keys():
        before.pop(KEPT_TEXT_KEY, None)
        after.pop(KEPT_TEXT_KEY, None)
    keys = [*before, *(key for key in after if key not in before)]
    return {
        key.removeprefix("recipe."): (before.get(key, _ABSENT), after.get(key, _ABSENT))
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT) and not covers(HARMLESS, key)
    }


def run_id(identity: Mapping[str, Any]) -> str:
    """What a run is known by: a hash of all settings that matter, as it began with them.

    Runs with equal ones have equal bytes, so that a checkpoint of the one is one of the other.
    """
    settings = {key: value for key, value in _flat(identity) if not covers(HARMLESS, key)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def refusal(found: Mapping[str, Change], allowed: Collection[str]) -> str | None:
    """Say which changes the run cannot go on with, and what to do; None where it can.

    A key in `allowed` covers those below it: `train` covers `train.seed`.
    """
    fixed = [key for key in found if key == "adapter" or covers(FIXED, key)]
    unwanted = [key for key in found if key in fixed or not covers(allowed, key)]
    if not unwanted:
        return None
    lines = [describe({key: found[key] for key in unwanted})]
    keys = [f"--allow-change {key}" for key in unwanted if key not in fixed]
    accept = f", or accept it with {' '.join(keys)}" if keys else ""
    undo = " ".join(words_of({key: found[key][0] for key in unwanted}))
    again = f"write {undo} again" if undo else "undo the change"
    lines.append(f"To continue that run, {again}{accept}.")
    if PROCESSES in unwanted:
        lines.append(
            "With num_processes accepted a step keeps its rows: train.batch_size and "
            "train.gradient_accumulation follow. The run goes on to the same losses within "
            "float32 rounding, and not to the same bytes."
        )
    if fixed:
        lines.append(
            f"{', '.join(fixed)} made the factors, which all checkpoints belong to, and cannot be "
            "accepted."
        )
    return "\n".join(lines)


def describe(found: Mapping[str, Change]) -> str:
    """One indented line a change."""
    return "\n".join(
        f"  {key}: {old!r} in the run, {new!r} now" for key, (old, new) in found.items()
    )


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings of a recipe as KEY=VALUE to type; none where one of them is no key of a recipe."""
    for key, value in settings.items():
        is_hash = key == KEPT_TEXT_KEY  # below a key of a recipe, and none of its own
        if value == _ABSENT or is_hash or not covers(_defaults(), f"recipe.{key}"):
            return []
    return [shlex.quote(f"{key}={value_to_yaml(value)}") for key, value in settings.items()]


@cache
def _defaults() -> Mapping[str, Any]:
    """The value of every key of a recipe that says nothing."""
    least = {"model": {"path": "-"}, "dataset": {"path": "-"}, "output_dir": "-"}
    return dict(_flat({"recipe": Recipe.model_validate(least).model_dump(mode="json")}))


def covers(keys: Collection[str], key: str) -> bool:
    """Whether a dotted key, or one above it, is among some keys."""
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
