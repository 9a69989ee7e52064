"""The rows to train on as a sequence over stores on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.encode.tokenized import IGNORED, TokenizedRow
from kpsvd_tune.data.rows.store import TokenStore


class StoredRows(Sequence[TokenizedRow]):
    """Rows of one or several stores in a given order; a row is made when it is asked for.

    Pickled it is the names of its folders and the order, so that processes share the files.

    Args:
        stores: The stores; places count through all of them, one after the other.
        order: (rows,) int64, a place for each row; a place may occur several times.

    Attributes:
        stores: The stores.
        order: The places.
    """

    def __init__(self, stores: Sequence[TokenStore], order: NDArray[np.int64]) -> None:
        self.stores = tuple(stores)
        self.order = order
        self._starts = np.cumsum([0, *map(len, stores)])

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> TokenizedRow | StoredRows:
        if isinstance(index, slice):
            return StoredRows(self.stores, self.order[index])
        store, place = self._place(index)
        ids, learnt = store.tokens(place)
        return TokenizedRow(
            tuple(ids.tolist()),
            tuple(np.where(learnt, ids, IGNORED).tolist()),
            int(store.numbers[place]),
        )

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) tokens of each row, without reading the rows."""
        return self._gather("lengths")

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """(rows,) tokens of each row that the loss counts, without reading the rows."""
        return self._gather("num_supervised")

    @cached_property
    def hashes(self) -> NDArray[np.int64]:
        """(rows,) a hash of each row's ids and labels, without reading the rows."""
        return self._gather("hashes")

    @property
    def max_token_id(self) -> int:
        """An id that no token of these rows is above."""
        return max((store.max_token_id for store in self.stores), default=-1)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredRows, (self.stores, self.order)

    def update(self, digest: Any) -> None:
        """Feed every id and label, in order, to a hash."""
        digest.update(len(self).to_bytes(8, "little"))
        for index in range(len(self)):
            store, place = self._place(index)
            ids, learnt = store.tokens(place)
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i8").tobytes())
            digest.update(np.where(learnt, ids, IGNORED).astype("<i8").tobytes())

    def _place(self, index: int) -> tuple[TokenStore, int]:
        place = int(self.order[index])
        which = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.stores[which], place - int(self._starts[which])

    def _gather(self, name: str) -> NDArray[np.int64]:
        if not self.stores:
            return np.empty(0, dtype=np.int64)
        values = np.concatenate([getattr(store, name) for store in self.stores])
        return values[self.order].astype(np.int64)


def num_shared(rows: Sequence[TokenizedRow], others: Sequence[TokenizedRow]) -> int:
    """How many of `rows` are among `others`, by ids and labels; rows of no store are not."""
    if not isinstance(rows, StoredRows) or not isinstance(others, StoredRows):
        return 0
    return int(np.isin(rows.hashes, others.hashes).sum())


def rows_sha256(*parts: StoredRows) -> str:
    """Hash every id and label of the parts, in order."""
    digest = hashlib.sha256()
    for rows in parts:
        rows.update(digest)
    return digest.hexdigest()
