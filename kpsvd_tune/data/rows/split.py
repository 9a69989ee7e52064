"""Which rows are used, which of them are trained and which held out, with notes on the others.

Two rows are the same where their ids and labels are, or where they are one row of one file (which
may be listed twice with other templates, or give several rows). No row may be on both sides: one
that is held out and trained under another number would silently make the validation loss too low.

Places count through all sources, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.encode.encoder import UNUSABLE, Mark
from kpsvd_tune.data.rows.batches import permutation
from kpsvd_tune.data.rows.store import StoredRows
from kpsvd_tune.data.rows.tokenise import TokenizedSource
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.units import counted

Places = NDArray[np.int64]


class Selection:
    """The rows at some ascending places of the sources, sorted into usable ones and others."""

    def __init__(
        self, sources: Sequence[TokenizedSource], places: Places, dataset: DatasetRecipe
    ) -> None:
        self.sources = sources
        self.places = places
        self._dataset = dataset
        self._marks = np.concatenate([source.store.marks for source in sources])[places]
        lengths = np.concatenate([source.store.lengths for source in sources])[places]
        is_whole = (self._marks & UNUSABLE) == 0
        self._is_dropped_long = is_whole & self._has(Mark.CUT) & (dataset.too_long == "drop")
        self._is_short = is_whole & (lengths < dataset.min_length)
        is_usable = is_whole & ~self._is_short & ~self._is_dropped_long
        self._is_cut = is_usable & self._has(Mark.CUT)
        self.usable: Places = places[is_usable]  # those of the rows that are used
        self.whole: Places = places[is_usable & ~self._is_cut]  # of these, those not cut
        self.num_cut = int(self._is_cut.sum())

    def stored(self, places: Places) -> StoredRows:
        """The rows at some places, a place maybe several times."""
        return StoredRows([source.store for source in self.sources], places)

    def by_source(self) -> list[Places]:
        """The places of the used rows of each source."""
        ends = np.cumsum([len(source.store) for source in self.sources])
        return np.split(self.usable, np.searchsorted(self.usable, ends[:-1]))

    def warnings(self) -> list[str]:
        """What a user should know about the rows: how many, where the first is, what to do."""
        limit, shortest = self._dataset.max_length, self._dataset.min_length
        kinds = (
            (self._has(Mark.EMPTY), "dropped: empty, or without a completion"),
            (
                self._has(Mark.FULL_PROMPT),
                f"dropped: the prompt alone fills dataset.max_length ({limit} tokens)",
            ),
            (
                self._is_dropped_long,
                f"dropped: longer than dataset.max_length ({limit} tokens), as dataset.too_long "
                "says",
            ),
            (self._is_short, f"dropped: shorter than dataset.min_length ({shortest} tokens)"),
            (
                self._has(Mark.SPECIAL),
                "with the text of a special token in them, which is read as that token: remove "
                "it unless it is meant",
            ),
            (self._has(Mark.INEXACT), "whose text this tokenizer does not give back exactly"),
            (
                self._is_cut,
                f"cut to dataset.max_length ({limit} tokens), which takes the end token away: "
                "raise it to learn whole completions, or leave such rows out with "
                "dataset.too_long: drop",
            ),
        )
        return [
            f"{counted(int(which.sum()), 'row')} {what} (first: "
            f"{self.where(self.places[which.argmax()])})"
            for which, what in kinds
            if which.any()
        ]

    def where(self, place: int | np.int64) -> str:
        """Source and number of the row at a place, as messages print them."""
        for source in self.sources:
            if place < len(source.store):
                return source.where(int(place))
            place -= len(source.store)
        raise IndexError(place)

    def _has(self, mark: Mark) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self._marks & mark) != 0
        return found


def divide(
    sources: Sequence[TokenizedSource],
    held_out: Sequence[TokenizedSource],
    dataset: DatasetRecipe,
    seed: int,
) -> tuple[Selection, Selection, list[str]]:
    """The rows to train on, those held out, and notes on rows that occur more than once.

    No held-out row is trained under another number. Rows are held out of `held_out`: sources of
    their own if `dataset.validation` is a path, else `sources` again. The places of the second
    selection count through `sources` first, then through its own.
    """
    everything = [*sources, *held_out] if isinstance(dataset.validation, str) else list(sources)
    whole = Selection(everything, np.arange(sum(len(each.store) for each in everything)), dataset)
    keys = _content_keys(everything)
    groups = _row_groups(everything, keys)
    pool, held = np.split(whole.places, [sum(len(source.store) for source in sources)])
    notes: list[str] = []
    if dataset.deduplicate:
        pool = _without_repeats(whole, keys, pool, notes, "")
        held = _without_repeats(whole, keys, held, notes, "validation: ")
    if isinstance(dataset.validation, str):
        # A held-out row that cannot be used keeps no other row out of training.
        train = pool[~np.isin(groups[pool], groups[np.intersect1d(held, whole.usable)])]
    else:
        _, rows = np.unique(source_rows(sources)[pool], return_inverse=True)
        usable = np.isin(pool, whole.usable)
        kept, chosen = split_rows(rows, dataset.validation, seed, groups[pool], usable)
        train, held = pool[kept], pool[chosen]
    leaks = np.intersect1d(np.setdiff1d(pool, np.union1d(train, held)), whole.usable)
    trained = np.intersect1d(train, whole.usable)
    if len(leaks):
        twin = held[groups[held] == groups[leaks[0]]][0]
        first = f"(first: {whole.where(leaks[0])} is {whole.where(twin)})"
        known = np.isin(groups[np.intersect1d(held, whole.usable)], groups[leaks])
        if isinstance(dataset.validation, str) and len(trained) and known.all():
            # A part of the training file, as `init` writes it: nothing to be warned of.
            are = "are" if len(leaks) > 1 else "is"
            notes.append(
                f"held out: {counted(len(leaks), 'row')} of the training file, which {are} not "
                f"trained on"
            )
        else:
            notes.append(
                f"LEFT OUT OF TRAINING: {counted(len(leaks), 'row')} that "
                f"{'are' if len(leaks) > 1 else 'is'} held out too, since training on them would "
                f"make the validation loss one of known rows {first}"
            )
    if len(leaks) and not len(trained):
        raise DataError(
            f"nothing is left to train on: {notes[-1]}; expected rows that are not held out: "
            "leave the validation file out of dataset.path, give dataset.validation another file, "
            "or hold out none (dataset.validation=0)"
        )
    repeats, first = _repeats(whole, keys, trained)
    if number := int(repeats.sum()):
        notes.append(
            f"REPEATED ROWS: {number} of {counted(len(trained), 'row')} to train on repeat another "
            f"({len(trained) - number} distinct; first: {first}): each is trained as often as it "
            "occurs; dataset.deduplicate=true trains each once"
        )
    return Selection(sources, train, dataset), Selection(everything, held, dataset), notes


def split_rows(
    groups: NDArray[np.int64],
    validation: int | float,
    seed: int,
    twins: NDArray[np.int64],
    usable: NDArray[np.bool_],
) -> tuple[Places, Places]:
    """Places to train on and to validate on: disjoint, both ascending; a function of the seed.

    `groups` are the places' rows, ascending from 0 without a gap: a row is held out with all of its
    places. Rows with equal `twins` are held out together; those beyond the number wanted are then
    on neither side. Rows not `usable` are never held out. `validation` is a number (int) or share
    (float) of rows; a share holds out at least one as long as one is left to train on.
    """
    places, num_places = np.arange(len(groups)), int(groups[-1]) + 1
    candidates = np.bincount(groups, weights=usable) > 0
    num_rows = int(candidates.sum())
    num_held_out = validation
    if isinstance(validation, float):
        num_held_out = min(max(1, round(validation * num_rows)), num_rows - 1) if validation else 0
    elif validation >= num_rows > 0:  # the caller refuses rows of which none can be learnt
        raise DataError(
            f"dataset.validation holds out {validation} rows and the dataset has {num_rows} "
            "that can be learnt; expected fewer, so that rows are left to train on: lower it, "
            "or give a share such as 0.1"
        )
    if num_held_out <= 0 or not num_rows:
        return places, places[:0]
    order = np.asarray(permutation(num_places, f"validation {seed}"))
    order = order[candidates[order]]
    # Sets of equal rows stand where their first row stands; without equal rows nothing moves.
    _, starts = np.unique(groups, return_index=True)
    order = order[np.argsort(_first_equal(twins[starts][order]), kind="stable")]
    is_held = np.zeros(num_places, dtype=bool)
    is_held[order[: int(num_held_out)]] = True
    held, rest = places[is_held[groups]], places[~is_held[groups]]
    return rest[~np.isin(twins[rest], twins[held])], held


def source_rows(sources: Sequence[TokenizedSource]) -> NDArray[np.int64]:
    """For each place which row of all sources it comes from, counted from 0."""
    parts: list[NDArray[np.int64]] = []
    start = 0
    for source in sources:
        parts.append(source.store.groups + start)
        start += int(source.store.groups[-1]) + 1 if len(source.store) else 0
    return np.concatenate(parts)


def mix(places: Places, weight: float, key: str) -> Places:
    """Repeat or thin out the rows of a source by its weight; a function of the key alone.

    Each row occurs floor(weight) times, side by side; round(fraction * rows) random ones occur once
    more. A weight that would keep no row keeps one.
    """
    whole = int(weight)
    num_more = round((weight - whole) * len(places))
    if whole == 0 and len(places):
        num_more = max(1, num_more)
    times = np.full(len(places), whole)
    times[np.asarray(permutation(len(places), key))[:num_more]] += 1
    return np.repeat(places, times)


def _content_keys(sources: Sequence[TokenizedSource]) -> Places:
    """For each row the place of the first equal one; a row without tokens equals no other."""
    hashes = np.concatenate([source.store.hashes for source in sources])
    marks = np.concatenate([source.store.marks for source in sources])
    keys = np.arange(len(hashes))
    (places,) = np.nonzero((marks & UNUSABLE) == 0)
    keys[places] = places[_first_equal(hashes[places])]
    return keys


def _row_groups(sources: Sequence[TokenizedSource], keys: Places) -> Places:
    """For each row the smallest place among those that must stay on one side of a split with it."""
    files = list(dict.fromkeys(source.content for source in sources))
    of_file = [np.full(len(each.store), files.index(each.content)) for each in sources]
    numbers = np.concatenate([source.store.numbers for source in sources])
    # For each row the place of the same row of the same file, which may have been listed before.
    origins = _first_equal(np.concatenate(of_file) * (numbers.max(initial=0) + 1) + numbers)
    groups = keys
    while True:
        # Groups that share a row of a file become one; two or three rounds settle it.
        merged = groups
        for shared in (origins, keys):
            lowest = np.full(len(groups), len(groups))
            np.minimum.at(lowest, shared, merged)
            merged = lowest[shared]
        if (merged == groups).all():
            return groups
        groups = merged


def _first_equal(values: NDArray[np.integer[Any]]) -> Places:
    """For each value the place of the first that equals it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    places: Places = first[inverse]
    return places


def _repeats(whole: Selection, keys: Places, places: Places) -> tuple[NDArray[np.bool_], str]:
    """(places,) which of them have the key of an earlier one, and the first such pair in words."""
    first = _first_equal(keys[places])
    repeats: NDArray[np.bool_] = first != np.arange(len(places))
    if not repeats.any():
        return repeats, ""
    which = int(repeats.argmax())
    return repeats, f"{whole.where(places[which])} is {whole.where(places[first[which]])}"


def _without_repeats(
    whole: Selection, keys: Places, places: Places, notes: list[str], lead: str
) -> Places:
    """The first of equal rows at some places; `notes` gets how many others there were."""
    repeats, first = _repeats(whole, keys, places)
    if number := int(repeats.sum()):
        notes.append(
            f"{lead}{counted(number, 'row')} left out that "
            f"{'repeats' if number == 1 else 'repeat'} "
            f"another, as dataset.deduplicate says (first: {first})"
        )
    kept: Places = places[~repeats]
    return kept
