"""Rows with equal content: found by the hashes in their stores, kept out of both halves of a split.

Two rows are the same where their ids and labels are, or where they are one row of one file (which
may be listed twice with other templates, or give several rows). A held-out row that is trained
under another number makes the validation loss a wrong figure, without a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.rows.store import UNUSABLE
from kpsvd_tune.data.rows.tokenise import TokenizedSource


def content_keys(sources: Sequence[TokenizedSource]) -> NDArray[np.int64]:
    """A number for each row: equal where ids and labels are equal.

    Args:
        sources: Their rows count through, one after the other.

    Returns:
        (rows,) the place of the first row with the same content. A row without tokens has no
        equal.
    """
    hashes = np.concatenate([source.store.hashes for source in sources])
    is_row = (np.concatenate([source.store.marks for source in sources]) & UNUSABLE) == 0
    keys = np.arange(len(hashes))
    (places,) = np.nonzero(is_row)
    _, first, inverse = np.unique(hashes[places], return_index=True, return_inverse=True)
    keys[places] = places[first][inverse]
    return keys


def row_groups(sources: Sequence[TokenizedSource], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each row: equal for rows that must stay on one side of a split.

    Args:
        sources: The sources.
        keys: From :func:`content_keys`.

    Returns:
        (rows,) the smallest place of a row's group.
    """
    origins = _origins(sources)
    if origins is None:
        return keys
    groups = keys
    while True:
        # Groups that share a row of a file become one; two or three rounds settle it.
        lowest = np.full(len(groups), len(groups))
        np.minimum.at(lowest, origins, groups)
        merged = lowest[origins]
        lowest = np.full(len(groups), len(groups))
        np.minimum.at(lowest, keys, merged)
        merged = lowest[keys]
        if (merged == groups).all():
            return groups
        groups = merged


def is_repeat(keys: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(places,) whether an earlier one of these places has the same key."""
    _, first = np.unique(keys[places], return_index=True)
    repeats = np.ones(len(places), dtype=bool)
    repeats[first] = False
    return repeats


def _origins(sources: Sequence[TokenizedSource]) -> NDArray[np.int64] | None:
    """For each row the first place of the same row of the same file; None: all differ."""
    files: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        files.setdefault(source.content, []).append(index)
    starts = np.cumsum([0, *(len(source.store) for source in sources)])
    origins = np.arange(starts[-1])
    differs = True
    for indices in files.values():
        numbers = np.concatenate([sources[index].store.numbers for index in indices])
        if len(indices) == 1 and (np.diff(numbers) > 0).all():
            continue
        places = np.concatenate([origins[starts[i] : starts[i + 1]] for i in indices])
        _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        origins[places] = places[first][inverse]
        differs = differs and len(first) == len(places)
    return None if differs else origins
