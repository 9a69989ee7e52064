"""Where rows come from: local files by plain path, everything else from the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kpsvd_tune.data.arrow import without_filled_nulls
from kpsvd_tune.data.files import SUFFIXES, Row, check_file, read_file, row_unit
from kpsvd_tune.errors import DataError
from kpsvd_tune.folders import expand

# A split name with an optional slice of row numbers, as the datasets library writes it.
_SPLIT = re.compile(r"(?P<name>[^\[\]]+)(?P<slice>\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\])?")


@dataclass(frozen=True)
class RowSource:
    """One file, or one configuration of a hub dataset, opened and not yet read.

    Attributes:
        label: File or hub dataset, as messages name it.
        unit: What its rows are numbered by: line or row.
        read: Gives the rows one at a time, from the first, at every call.
        fingerprint: Gives a text that changes when the rows do: the hash of a file's bytes, or
            what the `datasets` library knows a hub dataset by.
        part: Which rows of them are read.
        notes: What a user should know about the reading.
    """

    label: str
    unit: str
    read: Callable[[], Iterator[Row]]
    fingerprint: Callable[[], str]
    part: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedRows:
    """All rows in the order of their sources, and what a user should know about the reading."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def load_rows(
    path: str | Sequence[str],
    *,
    name: str | Sequence[str] | None = None,
    split: str = "train",
    offline: bool = False,
) -> LoadedRows:
    """Read one or several sources into memory, one after the other.

    Args:
        path: Local file (.jsonl, .json, .csv, .parquet), local dataset folder or hub id; or
            several of these.
        name: Configuration of a hub dataset, or several to read one after the other.
        split: Split of a hub dataset, in the notation of `datasets`.
        offline: Use only what the local hub cache holds.

    Raises:
        DataError: A source is missing or faulty; the message names source and line.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise DataError("dataset.path is an empty list; expected at least one file or hub id")
    rows: list[Row] = []
    notes: list[str] = []
    for one in paths:
        for source in open_sources(one, name=name, split=split, offline=offline):
            rows += source.read()
            notes += source.notes
    return LoadedRows(tuple(rows), tuple(notes))


def open_sources(
    path: str,
    *,
    name: str | Sequence[str] | None = None,
    split: str = "train",
    offline: bool = False,
    streaming: bool = False,
) -> list[RowSource]:
    """Find a file, or a hub dataset in each of its configurations.

    A local file holds no splits: `split` then may only slice it ("train[:100]"), and a name
    other than "train" is ignored with a note.

    Args:
        path: Local file (.jsonl, .json, .csv, .parquet), local dataset folder or hub id.
        name: Configuration of a hub dataset, or several.
        split: Split of a hub dataset, in the notation of `datasets`.
        offline: Use only what the local hub cache holds.
        streaming: Read a hub dataset over the network as it is needed, and keep no copy.

    Raises:
        DataError: There is no such source.
    """
    if is_local_file(path):
        return [_local(expand(path), split)]
    names = [name] if name is None or isinstance(name, str) else name
    return [_hub(path, one, split, offline, streaming) for one in names]


def is_local_file(source: str) -> bool:
    """Whether a path means a local file rather than a folder or a hub id."""
    path = expand(source)
    if path.suffix.lower() in SUFFIXES or path.is_file():
        return True
    looks_local = path.is_absolute() or source.startswith(("./", "../", "~"))
    return looks_local and not path.is_dir()


def _local(path: Path, split: str) -> RowSource:
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise DataError(
            f"dataset.split is {split!r}; expected a name such as train, or with row numbers "
            f"train[:100], for the local file {path}"
        )
    check_file(path)
    start, stop = (int(match[side]) if match[side] else None for side in ("start", "stop"))
    notes = () if match["name"] == "train" else (
        f"{path}: a local file has no splits, {match['name']!r} has no effect",
    )  # fmt: skip

    def read() -> Iterator[Row]:
        return _sliced(lambda: read_file(path), start, stop, f"dataset.split {split!r}", str(path))

    def fingerprint() -> str:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        # The kind of file decides how the bytes are read.
        return f"{path.suffix.lower()} {digest}"

    return RowSource(str(path), row_unit(path), read, fingerprint, f"{start}:{stop}", notes)


def _sliced(
    read: Callable[[], Iterator[Row]], start: int | None, stop: int | None, what: str, label: str
) -> Iterator[Row]:
    if any(side is not None and side < 0 for side in (start, stop)):
        # Counted from the end, which only a reading of its own finds.
        start, stop, _ = slice(start, stop).indices(sum(1 for _ in read()))
    is_empty = True
    for row in islice(read(), start, stop):
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{what} keeps none of the {sum(1 for _ in read())} rows of {label}")


def _hub(source: str, name: str | None, split: str, offline: bool, streaming: bool) -> RowSource:
    # Imported here: a run on local files pays nothing for it.
    from datasets import (  # type: ignore[import-untyped]
        DownloadConfig,
        load_dataset,
        load_dataset_builder,
    )

    match = _SPLIT.fullmatch(split)
    if streaming and match is None:
        raise DataError(
            f"dataset.split is {split!r}; expected a name such as train, or with row numbers "
            "train[:100], where dataset.streaming is true"
        )
    config = DownloadConfig(local_files_only=True) if offline else None

    def open_table() -> tuple[Any, str]:
        if not streaming:
            table = load_dataset(source, name, split=split, download_config=config)
            return table, str(table._fingerprint)
        assert match is not None
        builder = load_dataset_builder(source, name, download_config=config)
        # The library names its cache folder by the configuration and the state of the data files.
        return builder.as_streaming_dataset(split=match["name"]), f"{builder.cache_dir} {split}"

    label = f"{source} ({split})"
    table, fingerprint = _explained(open_table, source, name, split, offline)

    def rows() -> Iterator[Row]:
        records = iter(table)
        for number in range(1, 2**62):
            values = _explained(lambda: next(records, None), source, name, split, offline)
            if values is None:
                return
            yield Row(label, number, without_filled_nulls(values), "row")

    def read() -> Iterator[Row]:
        if not streaming or match is None or not match["slice"]:
            return rows()
        start, stop = (int(match[side]) if match[side] else None for side in ("start", "stop"))
        return _sliced(rows, start, stop, f"dataset.split {split!r}", source)

    return RowSource(label, "row", read, lambda: f"hub {fingerprint}")


def _explained(
    function: Callable[[], Any], source: str, name: str | None, split: str, offline: bool
) -> Any:
    try:
        return function()
    # The library raises many kinds (its own, OSError, ValueError, those of the hub client): all
    # of them mean that this dataset cannot be had as the recipe names it.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        where = "the local cache (offline)" if offline else "the hub"
        raise DataError(
            f"dataset.path {source!r}{f', name {name!r}' if name else ''}, split {split!r}: not "
            f"found as a local file and not loadable from {where}: {reason}. Check the spelling, "
            f"or give a local file ({', '.join(SUFFIXES)})"
        ) from error
