"""Load the rows of a dataset: local files by plain path, everything else from the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kpsvd_tune.data.files import SUFFIXES, Row, read_file
from kpsvd_tune.errors import DataError

# A split name with an optional slice of row numbers, as the datasets library writes it.
_SPLIT = re.compile(r"(?P<name>[^\[\]]+)(?P<slice>\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\])?")


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
    """Read one or several sources, one after the other.

    A local file holds no splits: `split` then may only slice it ("train[:100]"), and a name
    other than "train" is ignored with a note.

    Args:
        path: Local file (.jsonl, .json, .csv, .parquet), local dataset folder or hub id; or
            several of these.
        name: Configuration of a hub dataset, or several to read one after the other.
        split: Split of a hub dataset, in the notation of `datasets`.
        offline: Use only what the local hub cache holds.

    Raises:
        DataError: A source is missing or faulty; the message names source and line.
    """
    sources = [path] if isinstance(path, str) else list(path)
    if not sources:
        raise DataError("dataset.path is an empty list; expected at least one file or hub id")
    rows: list[Row] = []
    notes: list[str] = []
    for source in sources:
        if is_local_file(source):
            found, note = _read_local(Path(source).expanduser(), split)
            rows += found
            notes += note
        else:
            for one in [name] if name is None or isinstance(name, str) else name:
                rows += _read_hub(source, one, split, offline)
    return LoadedRows(tuple(rows), tuple(notes))


def is_local_file(source: str) -> bool:
    """Whether a path means a local file rather than a folder or a hub id."""
    path = Path(source).expanduser()
    if path.suffix.lower() in SUFFIXES or path.is_file():
        return True
    looks_local = path.is_absolute() or source.startswith(("./", "../", "~"))
    return looks_local and not path.is_dir()


def _read_local(path: Path, split: str) -> tuple[list[Row], list[str]]:
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise DataError(
            f"dataset.split is {split!r}; expected a name such as train, or with row numbers "
            f"train[:100], for the local file {path}"
        )
    rows = read_file(path)
    if match["slice"]:
        start, stop = (int(match[side]) if match[side] else None for side in ("start", "stop"))
        kept = rows[start:stop]
        if not kept:
            raise DataError(f"dataset.split {split!r} keeps none of the {len(rows)} rows of {path}")
        rows = kept
    if match["name"] == "train":
        return rows, []
    return rows, [f"{path}: a local file has no splits, {match['name']!r} has no effect"]


def _read_hub(source: str, name: str | None, split: str, offline: bool) -> list[Row]:
    # Imported here: a run on local files pays nothing for it.
    from datasets import DownloadConfig, load_dataset  # type: ignore[import-untyped]

    try:
        table = load_dataset(
            source,
            name,
            split=split,
            download_config=DownloadConfig(local_files_only=True) if offline else None,
        )
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
    label = f"{source} ({split})"
    return [Row(label, n, dict(values), "row") for n, values in enumerate(table, start=1)]
