"""Which rows are trained and which held out: no row on both sides, repeats counted and told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.rows.duplicates import content_keys, is_repeat, row_groups
from kpsvd_tune.data.rows.selection import Selection
from kpsvd_tune.data.rows.split import split_rows
from kpsvd_tune.data.rows.tokenise import TokenizedSource
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe


@dataclass(frozen=True)
class Halves:
    """Places of rows, ascending; of each half's own sources.

    Attributes:
        train: Rows to train on.
        validation: Rows held out.
        notes: What a user should know about rows that occur more than once.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    notes: tuple[str, ...]


def divide(
    sources: Sequence[TokenizedSource],
    held_out: Sequence[TokenizedSource],
    dataset: DatasetRecipe,
    seed: int,
) -> Halves:
    """Divide the rows, so that no held-out row is trained under another number.

    Args:
        sources: What is trained on.
        held_out: Sources of their own that are validated on, if `dataset.validation` is a path;
            else `sources` again.
        dataset: Its validation and deduplicate.
        seed: Decides which rows are held out.

    Raises:
        DataError: Every row to train on is held out too.
    """
    has_own = isinstance(dataset.validation, str)
    everything = [*sources, *held_out] if has_own else list(sources)
    whole = Selection(everything, np.arange(sum(len(each.store) for each in everything)), dataset)
    num_rows = sum(len(source.store) for source in sources)
    keys = content_keys(everything)
    groups = row_groups(everything, keys)
    pools = [np.arange(num_rows), np.arange(num_rows, len(keys))]
    notes = []
    if dataset.deduplicate:
        for index, pool in enumerate(pools):
            repeats = is_repeat(keys, pool)
            pools[index] = pool[~repeats]
            if repeats.any():
                notes.append(_left_out_note(whole, keys, pool, repeats, is_held=index == 1))
    pool, held = pools
    if isinstance(dataset.validation, str):
        # A row without tokens is held out by name only.
        train = pool[~np.isin(groups[pool], groups[np.intersect1d(held, whole.usable)])]
    else:
        _, rows = np.unique(source_rows(sources)[pool], return_inverse=True)
        usable = np.isin(pool, whole.usable)
        train, held = pool, pool[:0]
        if usable.any():  # the caller refuses rows of which none can be learnt
            kept, chosen = split_rows(rows, dataset.validation, seed, groups[pool], usable)
            train, held = pool[kept], pool[chosen]
    rest = np.setdiff1d(pool, np.union1d(train, held) if not has_own else train)
    leaks = np.intersect1d(rest, whole.usable)
    if len(leaks):
        notes.append(_leak_note(whole, groups, leaks, held))
    if len(leaks) and not np.isin(train, whole.usable).any():
        raise DataError(
            f"nothing is left to train on: {notes[-1]}; expected rows that are not held out: "
            "leave the validation file out of dataset.path, give dataset.validation another file, "
            "or hold out none (dataset.validation=0)"
        )
    trained = np.intersect1d(train, whole.usable)
    repeats = is_repeat(keys, trained)
    if repeats.any():
        notes.append(_repeat_note(whole, keys, trained, repeats))
    return Halves(train, held - num_rows if has_own else held, tuple(notes))


def source_rows(sources: Sequence[TokenizedSource]) -> NDArray[np.int64]:
    """For each place which row of all sources it comes from, counted from 0."""
    parts: list[NDArray[np.int64]] = []
    start = 0
    for source in sources:
        parts.append(source.store.groups + start)
        start += int(source.store.groups[-1]) + 1 if len(source.store) else 0
    return np.concatenate(parts)


def _leak_note(
    whole: Selection,
    groups: NDArray[np.int64],
    leaks: NDArray[np.int64],
    held: NDArray[np.int64],
) -> str:
    twin = held[groups[held] == groups[leaks[0]]][0]
    return (
        f"LEFT OUT OF TRAINING: {_rows(len(leaks))} that {_is(len(leaks))} held out too, since "
        "training on them would make the validation loss one of known rows (first: "
        f"{whole.where(int(leaks[0]))} is {whole.where(int(twin))})"
    )


def _repeat_note(
    whole: Selection,
    keys: NDArray[np.int64],
    places: NDArray[np.int64],
    repeats: NDArray[np.bool_],
) -> str:
    return (
        f"REPEATED ROWS: {int(repeats.sum())} of {_rows(len(places))} to train on repeat another "
        f"({int((~repeats).sum())} distinct; first: {_pair(whole, keys, places, repeats)}): each "
        "is trained as often as it occurs; dataset.deduplicate=true trains each once"
    )


def _left_out_note(
    whole: Selection,
    keys: NDArray[np.int64],
    places: NDArray[np.int64],
    repeats: NDArray[np.bool_],
    is_held: bool,
) -> str:
    number = int(repeats.sum())
    return (
        f"{'validation: ' if is_held else ''}{_rows(number)} left out that "
        f"{'repeats' if number == 1 else 'repeat'} another, as dataset.deduplicate says "
        f"(first: {_pair(whole, keys, places, repeats)})"
    )


def _pair(
    whole: Selection,
    keys: NDArray[np.int64],
    places: NDArray[np.int64],
    repeats: NDArray[np.bool_],
) -> str:
    place = places[repeats.argmax()]
    first = places[(keys[places] == keys[place]).argmax()]
    return f"{whole.where(int(place))} is {whole.where(int(first))}"


def _rows(number: int) -> str:
    return f"{number} row{'s' if number != 1 else ''}"


def _is(number: int) -> str:
    return "are" if number != 1 else "is"
