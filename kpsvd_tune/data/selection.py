"""Which rows of the sources are used, and what is said about the others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.sources import SourceSettings
from kpsvd_tune.data.store import UNUSABLE, Mark
from kpsvd_tune.data.tokenise import TokenizedSource
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe


def check_held_out(
    sources: Sequence[TokenizedSource], held_out: Sequence[TokenizedSource] | None
) -> list[str]:
    """Refuse rows that would be learnt and held out at once, as far as equal files tell.

    Args:
        sources: What is trained on.
        held_out: Sources of their own that are validated on; None: rows of `sources` are.

    Returns:
        What a user should know.

    Raises:
        DataError: Rows are held out of a source that occurs twice.
    """
    seen: dict[str, str] = {}
    for source in sources:
        place = source.store.folder.name
        if held_out is None and place in seen:
            earlier = seen[place]
            what = "is listed twice" if earlier == source.label else f"holds the rows of {earlier}"
            raise DataError(
                f"dataset.path: {source.label} {what}, so rows held out of one would be learnt "
                "from the other; expected each file once: give it a weight, such as "
                f"{{path: {source.label}, weight: 2}}, or set dataset.validation to a file, or 0"
            )
        seen[place] = source.label
    return [
        f"{source.label} is trained on as well: its loss says nothing about new rows"
        for source in held_out or ()
        if source.store.folder.name in seen
    ]


def check_ignored(sources: Sequence[TokenizedSource], settings: Sequence[SourceSettings]) -> None:
    """Refuse a column to leave out that no row has, which is a slip of the pen.

    Args:
        sources: All sources, those held out included.
        settings: How they are read.

    Raises:
        DataError: No row of any source has it.
    """
    found = {name for source in sources for name in source.ignored}
    wanted = {name: None for each in settings for name in each.ignore_columns}
    if missing := [name for name in wanted if name not in found]:
        labels = ", ".join(dict.fromkeys(source.label for source in sources))
        raise DataError(
            f"dataset.ignore_columns names {missing[0]!r}, and no row of {labels} has such a "
            "column; expected names of columns that are there: correct or remove it"
        )


class Selection:
    """The rows at some places of the sources, sorted into usable ones and others.

    Args:
        sources: The sources; places count through all of them, one after the other.
        places: (rows,) ascending places.
        dataset: Its max_length, min_length and too_long.
    """

    def __init__(
        self,
        sources: Sequence[TokenizedSource],
        places: NDArray[np.int64],
        dataset: DatasetRecipe,
    ) -> None:
        self._sources = sources
        self._places = places
        self._dataset = dataset
        self._marks = np.concatenate([source.store.marks for source in sources])[places]
        lengths = np.concatenate([source.store.lengths for source in sources])[places]
        is_whole = (self._marks & UNUSABLE) == 0
        self._is_dropped_long = (
            is_whole & self._has(Mark.CUT)
            if dataset.too_long == "drop"
            else np.zeros(len(places), dtype=bool)
        )
        self._is_short = is_whole & (lengths < dataset.min_length)
        self._is_usable = is_whole & ~self._is_short & ~self._is_dropped_long

    @cached_property
    def usable(self) -> NDArray[np.int64]:
        """(rows,) places of the rows that are used."""
        places: NDArray[np.int64] = self._places[self._is_usable]
        return places

    @property
    def whole(self) -> NDArray[np.int64]:
        """(rows,) places of the used rows that were not cut."""
        places: NDArray[np.int64] = self._places[self._is_usable & ~self._has(Mark.CUT)]
        return places

    @property
    def num_cut(self) -> int:
        """Used rows that were cut."""
        return int((self._is_usable & self._has(Mark.CUT)).sum())

    def by_source(self) -> list[NDArray[np.int64]]:
        """The places of the used rows of each source."""
        ends = np.cumsum([len(source.store) for source in self._sources])
        return np.split(self.usable, np.searchsorted(self.usable, ends[:-1]))

    def warnings(self) -> list[str]:
        """What a user should know about the rows: how many, where the first is, what to do."""
        limit = self._dataset.max_length
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
            (
                self._is_short,
                f"dropped: shorter than dataset.min_length ({self._dataset.min_length} tokens)",
            ),
            (
                self._has(Mark.SPECIAL),
                "with the text of a special token in them, which is read as that token: remove "
                "it unless it is meant",
            ),
            (self._has(Mark.INEXACT), "whose text this tokenizer does not give back exactly"),
        )
        notes = [
            f"{int(which.sum())} row{'s' if which.sum() > 1 else ''} {what} "
            f"(first: {self._where(int(self._places[which.argmax()]))})"
            for which, what in kinds
            if which.any()
        ]
        if self.num_cut:
            notes.append(
                f"{self.num_cut} row{'s' if self.num_cut > 1 else ''} cut to dataset.max_length "
                f"({limit} tokens), which takes the end token away: raise it to learn whole "
                "completions, or leave such rows out with dataset.too_long: drop"
            )
        return notes

    def _has(self, mark: Mark) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self._marks & mark) != 0
        return found

    def _where(self, place: int) -> str:
        for source in self._sources:
            if place < len(source.store):
                return source.where(place)
            place -= len(source.store)
        raise IndexError(place)
