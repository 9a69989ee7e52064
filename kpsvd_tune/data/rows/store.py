"""Tokenised rows on disk: flat arrays that every process maps into memory and none copies.

A store is a folder of .npy files and facts.json. It holds an entry for every row of its source,
usable or not, in their order; several side by side where each turn of a chat is a row to train on:

    token_ids       int32  the ids of all rows, end to end
    is_learnt       uint8  for each of them whether the loss counts it
    ends            int64  for each row where its ids end
    numbers         int64  its line or row number in the source
    num_supervised  int32  how many of its tokens the loss counts
    marks           uint8  what is out of the ordinary, as bits of `Mark`
    hashes          uint64 hash of its ids and of which of them are learnt; equal rows, equal hashes
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.encode.encoder import IGNORED, Mark, TokenizedRow
from kpsvd_tune.errors import DataError
from kpsvd_tune.storage.hashes import file_hash
from kpsvd_tune.storage.json_files import check_regular, parse_json, read_bytes

FACTS = "facts.json"
_TYPES = {
    "token_ids": "<i4",
    "is_learnt": "|u1",
    "ends": "<i8",
    "numbers": "<i8",
    "num_supervised": "<i4",
    "marks": "|u1",
    "hashes": "<u8",
}
_BLOCK = 1 << 20
# Files up to this size are read rather than mapped.
_SMALL_BYTES = 2**16


class StoreWriter:
    """Appends rows to a new store in an empty folder; memory holds about a million tokens."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / f"{name}.npy").open("w+b") for name in _TYPES}
        self._counts = dict.fromkeys(_TYPES, 0)
        self._waiting: list[TokenizedRow] = []
        self._num_waiting = 0
        self._max_token_id = -1
        for name in _TYPES:
            self._write_header(name)

    def add(self, row: TokenizedRow) -> None:
        """Append a row; one that cannot be used has no tokens, and marks that say why."""
        self._waiting.append(row)
        self._num_waiting += len(row) + 1
        if self._num_waiting > _BLOCK:
            self._flush()

    def close(self, facts: dict[str, Any]) -> None:
        """Finish the store; `facts` are JSON values to keep with it."""
        self._flush()
        digests = {}
        for name, file in self._files.items():
            file.seek(0)
            # A one-dimensional header has the same length whatever the count: numpy pads it.
            self._write_header(name)
            file.flush()
            file.seek(0)
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
            file.close()
        content = {"facts": facts, "digests": digests, "max_token_id": self._max_token_id}
        text = json.dumps({**content, "sha256": json_sha256(content)}, indent=1)
        (self._folder / FACTS).write_text(text, encoding="utf-8")

    def abandon(self) -> None:
        """Close the files of a store that will not be finished."""
        for file in self._files.values():
            with suppress(OSError):  # closing tries once more to write what a full disk refused
                file.close()

    def _flush(self) -> None:
        rows = self._waiting
        none = np.empty(0, dtype=np.int32)
        ids = np.concatenate([none, *(row.input_ids for row in rows)])
        columns: dict[str, Any] = {
            "token_ids": ids,
            "is_learnt": np.concatenate([none, *(row.labels for row in rows)]) != IGNORED,
            "ends": self._counts["token_ids"] + np.cumsum([len(row) for row in rows]),
            "numbers": [row.row for row in rows],
            "num_supervised": [row.num_supervised for row in rows],
            "marks": [int(row.marks) for row in rows],
            "hashes": [_row_hash(row) if len(row) else 0 for row in rows],
        }
        for name, values in columns.items():
            # Not tofile(), whose error does not say that the disk is full.
            self._files[name].write(np.asarray(values, dtype=_TYPES[name]).tobytes())
            self._files[name].flush()
            self._counts[name] += len(values)
        self._max_token_id = max(self._max_token_id, int(ids.max(initial=-1)))
        self._waiting, self._num_waiting = [], 0

    def _write_header(self, name: str) -> None:
        head = {"descr": _TYPES[name], "fortran_order": False, "shape": (self._counts[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], head)
        self._files[name].flush()


class TokenStore:
    """A finished store, mapped read-only; raises DataError where its files cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            content = parse_json(read_bytes(folder / FACTS))
        except OSError as error:
            raise DataError(
                f"the tokenised rows in {folder} are gone ({error.strerror}); expected the folder "
                "that the main process made: point XDG_CACHE_HOME at one that all machines of the "
                "run see, and start again"
            ) from error
        self.facts: dict[str, Any] = content["facts"]
        self.max_token_id = int(content["max_token_id"])  # -1 where there is none
        self.token_ids: NDArray[np.int32] = self._map("token_ids")
        self.is_learnt: NDArray[np.uint8] = self._map("is_learnt")
        self.ends: NDArray[np.int64] = self._map("ends")
        self.numbers: NDArray[np.int64] = self._map("numbers")
        self.num_supervised: NDArray[np.int32] = self._map("num_supervised")
        self.marks: NDArray[np.uint8] = self._map("marks")
        self.hashes: NDArray[np.uint64] = self._map("hashes")

    @classmethod
    def verified(cls, folder: Path) -> TokenStore | None:
        """Open a store whose content is what was written; None where it is absent or damaged."""
        try:
            content = parse_json(read_bytes(folder / FACTS))
            sha256 = content.pop("sha256")
            if sha256 != json_sha256(content) or set(content["digests"]) != set(_TYPES):
                return None
            for name, expected in content["digests"].items():
                check_regular(folder / f"{name}.npy")
                if file_hash(folder / f"{name}.npy") != expected:
                    return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return cls(folder)

    def __len__(self) -> int:
        return len(self.marks)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        """Another process maps the same files."""
        return TokenStore, (self.folder,)

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """For each row which of the source's rows it comes from, counted from 0."""
        is_new = np.diff(self.numbers, prepend=self.numbers[:1]) != 0
        return np.cumsum(is_new)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """For each row how many tokens it has."""
        return np.diff(self.ends, prepend=0)

    def row(self, place: int) -> TokenizedRow:
        """The row at a place; its ids are a slice of the file's."""
        start, end = int(self.ends[place - 1]) if place else 0, int(self.ends[place])
        ids = self.token_ids[start:end]
        labels = np.where(self.is_learnt[start:end], ids, np.int32(IGNORED))
        return TokenizedRow(ids, labels, int(self.numbers[place]), Mark(int(self.marks[place])))

    def _map(self, name: str) -> NDArray[Any]:
        file = self.folder / f"{name}.npy"
        try:
            # A map holds a file open: small files are read, as there may be hundreds of sources.
            # A file that was shortened fails to be read just as it fails to be mapped.
            with suppress(ValueError):
                if file.stat().st_size > _SMALL_BYTES:
                    return np.lib.format.open_memmap(file, mode="r")
            with file.open("rb") as stream:
                content: NDArray[Any] = np.lib.format.read_array(stream)
            return content
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"the tokenised rows in {file} cannot be read: {error}") from error


class StoredRows(Sequence[TokenizedRow]):
    """Rows of one or several stores in a given order; a row is made when it is asked for.

    Pickled it is the names of its folders and the order, so that processes share the files.

    Args:
        stores: The stores; places count through all of them, one after the other.
        order: (rows,) int64, a place for each row; a place may occur several times.
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
        place = int(self.order[index])
        which = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.stores[which].row(place - int(self._starts[which]))

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


def are_among(rows: Sequence[TokenizedRow], others: StoredRows) -> NDArray[np.bool_]:
    """(rows,) which of some rows are among those of stores, by ids and labels."""
    hashes = np.array([_row_hash(row) for row in rows], dtype=np.uint64).astype(np.int64)
    return np.isin(hashes, others.hashes)


def rows_sha256(*parts: StoredRows) -> str:
    """Hash every id and label of the parts, in order."""
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(len(rows).to_bytes(8, "little"))
        for row in rows:
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.input_ids.astype("<i8").tobytes())
            digest.update(row.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def store_files(folder: Path) -> list[Path]:
    """The files of the store in a folder, whether they are there or not."""
    return [folder / FACTS, *(folder / f"{name}.npy" for name in _TYPES)]


def json_sha256(content: Any) -> str:
    """Hash a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _row_hash(row: TokenizedRow) -> int:
    # Of 64 bits: among a hundred million rows two that differ share one with a chance of 0.03 %.
    digest = hashlib.blake2b(row.input_ids.astype("<i4").tobytes(), digest_size=8)
    digest.update(row.labels.astype("<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")
