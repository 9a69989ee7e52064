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
from array import array
from collections.abc import Sequence
from contextlib import suppress
from enum import IntFlag
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.encode.encoder import IGNORED, TokenizedRow
from kpsvd_tune.errors import DataError
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
_CODES = {"<i4": "i", "<i8": "q", "|u1": "B", "<u8": "Q"}
_BLOCK = 1 << 20
# Files up to this size are read rather than mapped.
_SMALL_BYTES = 2**16


class Mark(IntFlag):
    """What is out of the ordinary with a row."""

    EMPTY = 1  # nothing to learn in it
    FULL_PROMPT = 2  # nothing to learn within the maximal length
    CUT = 4  # longer than the maximal length
    SPECIAL = 8  # its text holds the text of a special token
    INEXACT = 16  # the tokenizer does not give its text back
    FAULTY = 32  # cannot be read or laid out, and is left out


UNUSABLE = Mark.EMPTY | Mark.FULL_PROMPT | Mark.FAULTY


class StoreWriter:
    """Appends rows to a new store; memory holds a megabyte or so of them.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / f"{name}.npy").open("w+b") for name in _TYPES}
        self._buffers = {name: array(_CODES[kind]) for name, kind in _TYPES.items()}
        self._labels = array("i")  # as they come; `is_learnt` is made of them in one go
        self._counts = dict.fromkeys(_TYPES, 0)
        self._end = 0
        self._max_token_id = -1
        for name in _TYPES:
            self._write_header(name)

    def add(self, number: int, row: TokenizedRow | None, marks: Mark) -> None:
        """Append a row; None stands for one that cannot be used."""
        if row is not None:
            self._buffers["token_ids"].extend(row.input_ids)
            self._labels.extend(row.labels)
            self._end += len(row.input_ids)
        self._buffers["ends"].append(self._end)
        self._buffers["numbers"].append(number)
        self._buffers["num_supervised"].append(0 if row is None else row.num_supervised)
        self._buffers["marks"].append(marks)
        self._buffers["hashes"].append(0 if row is None else _row_hash(row))
        if len(self._buffers["token_ids"]) + len(self._buffers["ends"]) > _BLOCK:
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
        text = json.dumps({**content, "sha256": _hash(content)}, indent=1)
        (self._folder / FACTS).write_text(text, encoding="utf-8")

    def abandon(self) -> None:
        """Close the files of a store that will not be finished."""
        for file in self._files.values():
            with suppress(OSError):  # what a full disk does not take is tried again here
                file.close()

    def _flush(self) -> None:
        ids, labels = (
            np.asarray(each, dtype="<i4") for each in (self._buffers["token_ids"], self._labels)
        )
        self._max_token_id = max(self._max_token_id, int(ids.max(initial=-1)))
        self._buffers["is_learnt"].frombytes((labels != IGNORED).tobytes())
        for name, buffer in self._buffers.items():
            # Not tofile(), whose error does not say that the disk is full.
            self._files[name].write(np.asarray(buffer, dtype=_TYPES[name]).tobytes())
            self._files[name].flush()
            self._counts[name] += len(buffer)
        # New ones: an array that numpy looks into cannot be emptied.
        self._labels = array("i")
        self._buffers = {name: array(buffer.typecode) for name, buffer in self._buffers.items()}

    def _write_header(self, name: str) -> None:
        head = {"descr": _TYPES[name], "fortran_order": False, "shape": (self._counts[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], head)
        self._files[name].flush()


class TokenStore:
    """A finished store, mapped read-only.

    Args:
        folder: Its folder.

    Attributes:
        folder: Its folder.
        facts: What was kept with it.
        max_token_id: Largest id in it, -1 where there is none.

    Raises:
        DataError: It is not there.
    """

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
        self.max_token_id = int(content["max_token_id"])

    @classmethod
    def verified(cls, folder: Path) -> TokenStore | None:
        """Open a store whose content is what was written; None where it is absent or damaged."""
        try:
            content = parse_json(read_bytes(folder / FACTS))
            if content.pop("sha256") != _hash(content) or set(content["digests"]) != set(_TYPES):
                return None
            for name, expected in content["digests"].items():
                check_regular(folder / f"{name}.npy")
                with (folder / f"{name}.npy").open("rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
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
    def token_ids(self) -> NDArray[np.int32]:
        """The ids of all rows, end to end."""
        return self._map("token_ids")

    @cached_property
    def is_learnt(self) -> NDArray[np.uint8]:
        """For each token whether it is learnt."""
        return self._map("is_learnt")

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """For each row where its ids end."""
        return self._map("ends")

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """For each row its number in the source."""
        return self._map("numbers")

    @cached_property
    def num_supervised(self) -> NDArray[np.int32]:
        """For each row how many tokens are learnt."""
        return self._map("num_supervised")

    @cached_property
    def marks(self) -> NDArray[np.uint8]:
        """For each row its bits of `Mark`."""
        return self._map("marks")

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """For each row the hash of its ids and labels; 0 where it has none."""
        return self._map("hashes")

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """For each row which of the source's rows it comes from, counted from 0."""
        is_new = np.diff(self.numbers, prepend=self.numbers[:1]) != 0
        return np.cumsum(is_new)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """For each row how many tokens it has."""
        return np.diff(self.ends, prepend=0)

    def tokens(self, place: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The ids of one row, and which of them are learnt."""
        start = int(self.ends[place - 1]) if place else 0
        end = int(self.ends[place])
        return self.token_ids[start:end], self.is_learnt[start:end].view(np.bool_)

    def _map(self, name: str) -> NDArray[Any]:
        file = self.folder / f"{name}.npy"
        try:
            try:
                # A map holds a file open, and hundreds of small sources are read as well as mapped.
                if file.stat().st_size > _SMALL_BYTES:
                    return np.lib.format.open_memmap(file, mode="r")
            except ValueError:
                pass  # a shortened file, which cannot be read either
            with file.open("rb") as stream:
                content: NDArray[Any] = np.lib.format.read_array(stream)
            return content
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"the tokenised rows in {file} cannot be read: {error}") from error


def store_files(folder: Path) -> list[Path]:
    """The files of the store in a folder, whether they are there or not."""
    return [folder / FACTS, *(folder / f"{name}.npy" for name in _TYPES)]


def _row_hash(row: TokenizedRow) -> int:
    # Of 64 bits: among a hundred million rows two that differ share one with a chance of 0.03 %.
    digest = hashlib.blake2b(array("i", row.input_ids).tobytes(), digest_size=8)
    digest.update(array("i", row.labels).tobytes())
    return int.from_bytes(digest.digest(), "little")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
