"""Keeps the rows of a step where a run goes on, as was allowed, on another number of processes.

A step takes batch_size x processes x gradient_accumulation rows, and which rows those are depends
on their number alone. So the other two follow the number of processes, and the place in the data,
the schedule and the number of steps stay what they were.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kpsvd_tune.errors import CheckpointError
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.runs.identity import NOT_THE_SAME_BYTES, PROCESSES, covers
from kpsvd_tune.units import counted

# What follows the number of processes, and is accepted with it.
FOLLOWING = ("train.batch_size", "train.gradient_accumulation")


@dataclass(frozen=True)
class Fitted:
    """A recipe whose steps take the rows that the run's steps took before."""

    recipe: Recipe
    accepted: tuple[str, ...] = ()  # keys that may differ from the run's, beside those allowed
    note: str | None = None  # what was fitted, to be told


def fit_global_batch(
    recipe: Recipe, record: Mapping[str, Any], num_processes: int, allowed: Collection[str]
) -> Fitted:
    """Fit `train.batch_size` and `train.gradient_accumulation` to another number of processes.

    Nothing is fitted where the number was never another one, where its change is not allowed,
    which is then refused with all others, or where a change of the two keys was asked for, which
    moves the place in the data and is noted. The
    batch size of a process is the largest up to the recipe's that makes whole micro steps.

    Args:
        recipe: As it was typed.
        record: Content of the run's run.json, of a run with a checkpoint.
        num_processes: Of this session.
        allowed: Keys that may differ from the run's.

    Raises:
        CheckpointError: The processes cannot share the rows of a step equally.
    """
    identity = record.get("identity", {})
    known = identity.get("recipe", {}).get("train", {})
    before = identity.get(PROCESSES, num_processes)
    is_other = before != num_processes
    was_other = any(each.get("key") == PROCESSES for each in record.get("changes", ()))
    if is_other and not covers(allowed, PROCESSES):
        return Fitted(recipe)
    if not {"batch_size", "gradient_accumulation"} <= known.keys():
        return Fitted(recipe)
    old = (known["batch_size"], known["gradient_accumulation"])
    typed = (recipe.train.batch_size, recipe.train.gradient_accumulation)
    rows = old[0] * old[1] * before
    asked = [
        key
        for key, one, other in zip(FOLLOWING, old, typed, strict=True)
        if one != other and covers(allowed, key)
    ]
    if asked and (now := typed[0] * typed[1] * num_processes) != rows:
        return Fitted(recipe, note=_moved(rows, now))
    if not is_other and not was_other:
        return Fitted(recipe)
    sizes = _sizes(rows, num_processes, *typed)
    fitted = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(
                update={"batch_size": sizes[0], "gradient_accumulation": sizes[1]}
            )
        }
    )
    return Fitted(fitted, FOLLOWING, _note(rows, (before, num_processes), typed, sizes))


def _sizes(rows: int, num_processes: int, most: int, typed_steps: int) -> tuple[int, int]:
    if most * typed_steps * num_processes == rows:
        return most, typed_steps
    if rows % num_processes:
        fitting = [str(number) for number in range(1, rows + 1) if rows % number == 0]
        raise CheckpointError(
            f"a step of this run takes {rows} rows, which "
            f"{counted(num_processes, 'process', 'processes')} cannot "
            "share equally (train.batch_size x processes x train.gradient_accumulation); go on "
            f"with one of {', '.join(fitting)} processes, or let a step take other "
            "rows from here on: set both keys, and pass --allow-change train.batch_size "
            "--allow-change train.gradient_accumulation as well"
        )
    own = rows // num_processes
    size = max(each for each in range(1, min(most, own) + 1) if own % each == 0)
    return size, own // size


def _moved(rows: int, now: int) -> str:
    """What follows where a step takes other rows from here on."""
    what = (
        "rows in between are left out of this pass"
        if now > rows
        else "rows that were seen come again in this pass"
    )
    return (
        f"a step takes {counted(now, 'row')} from here on, and took {rows}: the place in the data "
        f"is the step's number times its rows, so {what}; epochs and the number of steps count as "
        f"if every step had taken {now}"
    )


def _note(
    rows: int, processes: tuple[int, int], typed: tuple[int, int], sizes: tuple[int, int]
) -> str | None:
    before, now = processes
    where = f"train.batch_size {sizes[0]} and train.gradient_accumulation {sizes[1]}"
    if before != now:
        return (
            f"going on with {counted(now, 'process', 'processes')} in place of {before}: a step "
            "takes the same "
            f"{rows} rows as before, by {where}. The run is from here on {NOT_THE_SAME_BYTES}"
        )
    if typed != sizes:
        return (
            f"this run went on with another number of processes, and a step still takes its {rows} "
            f"rows: {where} are used, not the recipe's {typed[0]} and {typed[1]}"
        )
    return None
