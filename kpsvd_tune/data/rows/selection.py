"""Which rows of the sources are used, and what is said about the others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.rows.store import UNUSABLE, Mark
from kpsvd_tune.data.rows.tokenise import TokenizedSource
from kpsvd_tune.recipe import DatasetRecipe


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
            f"(first: {self.where(int(self._places[which.argmax()]))})"
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

    def where(self, place: int) -> str:
        """Source and number of the row at a place, as messages print them."""
        for source in self._sources:
            if place < len(source.store):
                return source.where(place)
            place -= len(source.store)
        raise IndexError(place)
