"""Where rows come from: local files by plain path, everything else from the hub."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from kpsvd_tune.data.read.files import (
    SUFFIXES,
    Row,
    check_file,
    kind_of,
    read_file,
    row_unit,
    without_filled_nulls,
)
from kpsvd_tune.data.read.folders import (
    HELD_OUT,
    Listing,
    is_pattern,
    list_card,
    list_folder,
    list_pattern,
)
from kpsvd_tune.errors import DataError
from kpsvd_tune.offline import hub_problem, is_offline
from kpsvd_tune.recipe import DatasetRecipe, SourceRecipe
from kpsvd_tune.recipe.paths import rows_problem
from kpsvd_tune.storage.hashes import file_hash
from kpsvd_tune.storage.paths import expand


@dataclass(frozen=True)
class RowSource:
    """One file, or one configuration of a hub dataset, found and not yet read."""

    label: str  # file or hub dataset, as messages name it
    unit: str  # what its rows are numbered by: line or row
    read: Callable[[], Iterator[Row]]  # gives the rows from the first, at every call
    fingerprint: Callable[[], str]  # a text that changes when the rows do
    part: str = ""  # which of the rows are read
    notes: tuple[str, ...] = ()  # what a user should know about the reading


@dataclass(frozen=True)
class LoadedRows:
    """All rows in the order of their sources, and what a user should know about the reading."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def load_rows(
    path: str | Sequence[str], *, name: str | Sequence[str] | None = None, split: str = "train"
) -> LoadedRows:
    """Read one or several sources into memory, one after the other.

    Args:
        path: Local file, folder, pattern or hub id; or several of these.
        name: Configuration of a hub dataset, or several to read one after the other.
        split: Split of a hub dataset, in the notation of `datasets`.

    Raises:
        DataError: A source is missing or faulty; the message names source and line.
    """
    paths = [path] if isinstance(path, str) else path
    if not paths:
        raise DataError("dataset.path is an empty list; expected at least one file or hub id")
    sources = [each for one in paths for each in open_sources(one, name=name, split=split)]
    rows = []
    for row in (row for source in sources for row in source.read()):
        if row.fault is not None:
            raise row.fault
        rows.append(row)
    return LoadedRows(tuple(rows), tuple(note for source in sources for note in source.notes))


def open_sources(
    path: str,
    *,
    name: str | Sequence[str] | None = None,
    split: str = "train",
    streaming: bool = False,
    is_held_out: bool = False,
) -> list[RowSource]:
    """Find the files of a path, or a hub dataset in each of its configurations.

    A local file holds no splits: `split` then may only slice it ("train[:100]"), and another name
    is ignored with a note, as `name` is. Each file of a folder or pattern is a source of its own;
    with `is_held_out` those of its validation or test are read. With `streaming` a hub dataset is
    read over the network and no copy is kept. Raises DataError where there is no such source.
    """
    names = [name] if name is None or isinstance(name, str) else list(name)
    place = expand(path)
    if place.is_dir() and (listings := list_card(place, names)):
        return [each for one in listings for each in _listed(one, split, is_held_out)]
    local = _open_local(path, split, is_held_out)
    if local is None:
        if problem := rows_problem(path):
            raise DataError(f"dataset.path: {problem}")
        return [_hub(path, one, split, streaming) for one in names]
    if name is not None:
        note = f"dataset.name {name!r} has no effect: {path} is local and has no configurations"
        local[0] = replace(local[0], notes=(*local[0].notes, note))
    return local


def is_local_file(source: str) -> bool:
    """Whether a path means a local file rather than a folder or a hub id."""
    path = expand(source)
    if kind_of(path) in SUFFIXES or path.is_file():
        return True
    looks_local = path.is_absolute() or source.startswith(("./", "../", "~"))
    return looks_local and not path.is_dir()


def _open_local(path: str, split: str, is_held_out: bool) -> list[RowSource] | None:
    """The sources of a local path; None where it is a hub id."""
    place = expand(path)
    if is_pattern(path):
        return _listed(list_pattern(path), split, is_held_out)
    if is_local_file(path):
        check_file(place)
        return _without_splits(
            f"{place}: is one file without splits", split, lambda part: _file(place, part)
        )
    if not place.is_dir():
        return None
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return _saved(place, split, is_held_out)
    return _listed(list_folder(place), split, is_held_out)


def _without_splits(what: str, split: str, source: Callable[[Part], RowSource]) -> list[RowSource]:
    """The sources of one table of rows, of which a split can only name stretches."""
    parts = parse_split(split)
    names = list(dict.fromkeys(part.name for part in parts))
    if len(names) > 1:
        raise DataError(
            f"{what}, and dataset.split is {split!r}, which would read its rows {len(parts)} "
            "times; expected one name, such as train, or stretches of it"
        )
    notes = [] if names == ["train"] else [f"{what}: the split {names[0]!r} has no effect"]
    return _with_notes(map(source, parts), notes)


def _listed(listing: Listing, split: str, is_held_out: bool) -> list[RowSource]:
    """A source for each file that a split has rows in."""
    sources: list[RowSource] = []
    notes: dict[str, None] = {}
    for part in parse_split(split):
        files, note = listing.choose(part.name, is_held_out=is_held_out)
        notes[note] = None
        for file in files:
            check_file(file)
        if part.is_whole or len(files) == 1:
            sources += [_file(file, part) for file in files]
        else:
            sources += _across(files, part, listing.label)
    return _with_notes(sources, notes)


def _across(files: Sequence[Path], part: Part, label: str) -> list[RowSource]:
    """A stretch of rows that are counted through several files."""
    counts = [sum(1 for _ in read_file(file)) for file in files]
    total = sum(counts)
    first, stop = part.bounds(lambda: total)
    last = total if stop is None else min(stop, total)
    sources = []
    start = 0
    for file, count in zip(files, counts, strict=True):
        begin, end = max(first - start, 0), min(last - start, count)
        if begin < end:
            sources.append(_file(file, Part(part.name, begin, end, split=part.split)))
        start += count
    if not sources:
        raise DataError(f"dataset.split {part.split!r} keeps none of the {total} rows of {label}")
    return sources


def _file(path: Path, part: Part) -> RowSource:
    return RowSource(
        str(path),
        row_unit(path),
        lambda: _sliced(lambda: read_file(path), part, str(path)),
        # The kind of file decides how the bytes are read.
        lambda: f"{''.join(path.suffixes[-2:]).lower()} {file_hash(path)}",
        part.stretch,
    )


def _saved(folder: Path, split: str, is_held_out: bool) -> list[RowSource]:
    """What `save_to_disk` of the datasets library wrote: one table, or one for each split."""
    from datasets import Dataset, load_from_disk  # type: ignore[import-untyped]

    try:
        found = load_from_disk(str(folder))
    # Of many kinds, all of which mean a damaged folder.
    except Exception as error:
        raise DataError(
            f"{folder}: looks like a folder of save_to_disk and cannot be loaded: "
            f"{_reason(error)}; save it anew"
        ) from error
    if isinstance(found, Dataset):
        what = f"{folder}: holds one table without splits"
        return _without_splits(what, split, lambda part: _table(found, str(folder), part))
    sources = []
    for part in parse_split(split):
        wanted = part.name
        if is_held_out:
            wanted = next((each for each in HELD_OUT if each in found), wanted)
        if wanted not in found:
            raise DataError(
                f"dataset.split is {split!r} and {folder} has the splits {', '.join(found)}; "
                "expected one of these"
            )
        sources.append(_table(found[wanted], f"{folder} ({wanted})", part))
    return sources


def _table(table: Any, label: str, part: Part) -> RowSource:
    def fingerprint() -> str:
        digests = [bytes.fromhex(file_hash(file["filename"])) for file in table.cache_files]
        return f"saved {hashlib.sha256(b''.join(digests)).hexdigest()}"

    def read() -> Iterator[Row]:
        return _sliced(lambda: _rows(label, table), part, label)

    return RowSource(label, "row", read, fingerprint, part.stretch)


def _rows(label: str, records: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, values in enumerate(records, start=1):
        yield Row(label, number, without_filled_nulls(values), "row")


def _with_notes(sources: Iterable[RowSource], notes: Iterable[str]) -> list[RowSource]:
    first, *others = sources
    return [replace(first, notes=tuple(notes)), *others]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _sliced(read: Callable[[], Iterator[Row]], part: Part, label: str) -> Iterator[Row]:
    """The rows of a stretch, of which there must be one."""
    start, stop = part.bounds(lambda: sum(1 for _ in read()))
    rows = iter(()) if stop is not None and stop <= start else islice(read(), start, stop)
    first = next(rows, None)
    if first is None:
        number = sum(1 for _ in read())
        where = f" in {part.stretch}" if "+" in part.split else ""
        raise DataError(
            f"dataset.split {part.split!r}{where} keeps none of the {number} rows of {label}"
        )
    yield from chain([first], rows)


def _hub_access(source: str) -> tuple[bool, str, tuple[str, ...]]:
    """Whether the local cache alone is read, where rows come from in words, and notes on that."""
    variables = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    problem = hub_problem(*variables)
    if problem is None:
        return False, "the hub", ()
    if is_offline(*variables):
        return True, "the local cache (offline)", ()
    note = f"the hub cannot be reached: {source} is read from the local cache"
    return True, f"the local cache, and the hub cannot be reached: {problem}", (note,)


@contextlib.contextmanager
def _not_asked(offline: bool) -> Iterator[None]:
    """Keep the libraries from asking the hub: they look at this constant at every call."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub(source: str, name: str | None, split: str, streaming: bool) -> RowSource:
    # Imported here: a run on local files pays nothing for it.
    from datasets import DownloadConfig, load_dataset, load_dataset_builder

    parts = parse_split(split)
    if streaming and (len(parts) > 1 or parts[0].is_percent):
        raise DataError(
            f"dataset.split is {split!r}; expected a name such as train, or with row numbers "
            "train[:100], where dataset.streaming is true"
        )
    offline, where, notes = _hub_access(source)
    config = DownloadConfig(local_files_only=True) if offline else None

    def explained(function: Callable[[], Any]) -> Any:
        try:
            return function()
        # The library raises many kinds (its own, OSError, ValueError, those of the hub client):
        # all of them mean that this dataset cannot be had as the recipe names it.
        except Exception as error:
            raise DataError(
                f"dataset.path {source!r}{f', name {name!r}' if name else ''}, split {split!r}: "
                f"not found as a local file and not loadable from {where}: {_reason(error)}. "
                f"Check the spelling, or give a local file ({', '.join(SUFFIXES)})"
            ) from error

    def open_table() -> tuple[Any, str]:
        if not streaming:
            table = load_dataset(source, name, split=split, download_config=config)
            return table, str(table._fingerprint)
        builder = load_dataset_builder(source, name, download_config=config)
        # The library names its cache folder by the configuration and the state of the data files.
        return builder.as_streaming_dataset(split=parts[0].name), f"{builder.cache_dir} {split}"

    label = f"{source} ({split})"
    with _not_asked(offline):
        table, fingerprint = explained(open_table)

    def rows() -> Iterator[Row]:
        records = iter(table)
        return _rows(label, iter(lambda: explained(lambda: next(records, None)), None))

    def read() -> Iterator[Row]:
        return _sliced(rows, parts[0], source) if streaming else rows()

    return RowSource(label, "row", read, lambda: f"hub {fingerprint}", notes=notes)


_SIDE = r"(?P<{0}>-?\d[\d_]*)(?P<{0}_pct>%)?"
_PART = re.compile(
    r"(?P<name>[^\[\]+()\s]+)"
    rf"(\[\s*({_SIDE.format('start')})?\s*:\s*({_SIDE.format('stop')})?\s*\])?"
    r"(\((?P<rounding>closest|pct1_dropremainder)\))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Part:
    """One split, or a stretch of its rows; negative numbers count from the end."""

    name: str
    start: int | None = None
    stop: int | None = None  # one past the last
    is_percent: bool = False  # whether the two are per cent of the rows
    drops_remainder: bool = False  # whether one per cent is a whole number of rows
    split: str = ""  # the recipe's whole `split`, for messages

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole split."""
        return self.start is None and self.stop is None

    @property
    def stretch(self) -> str:
        """Which rows of a file it is, whatever the split is called."""
        unit = ("%" if self.is_percent else "") + ("-" if self.drops_remainder else "")
        sides = ["" if side is None else f"{side}{unit}" for side in (self.start, self.stop)]
        return f"[{':'.join(sides)}]"

    def bounds(self, count: Callable[[], int]) -> tuple[int, int | None]:
        """First row and one past the last, from 0 (None: to the end).

        Per cent go to the nearest row, as in `datasets`. `count`, the number of rows, may take long
        and is called only where it is needed.
        """
        sides = (self.start, self.stop)
        if not self.is_percent and all(side is None or side >= 0 for side in sides):
            return self.start or 0, self.stop
        number = count()
        start, stop = (None if side is None else self._row(side, number) for side in sides)
        first, last, _ = slice(start, stop).indices(number)
        return first, last

    def _row(self, side: int, number: int) -> int:
        if not self.is_percent:
            return side
        if self.drops_remainder:
            return side * (number // 100)
        return round(side * number / 100)


def parse_split(split: str) -> tuple[Part, ...]:
    """Read the recipe's `split`."""
    parts = []
    for text in split.split("+"):
        match = _PART.fullmatch(text.strip())
        if match is None:
            raise DataError(
                f"dataset.split is {split!r}; expected a name such as train, a stretch of its rows "
                "such as train[:100], train[-100:] or train[10%:20%], or several joined by +"
            )
        sides = {side: int(match[side]) for side in ("start", "stop") if match[side] is not None}
        percent = {match[f"{side}_pct"] == "%" for side in sides}
        is_percent, rounding = percent == {True}, match["rounding"]
        fault = None
        if len(percent) == 2:
            fault = (
                ", which mixes rows and per cent in one stretch; expected two numbers of rows, or "
                "both with %"
            )
        elif is_percent and any(abs(side) > 100 for side in sides.values()):
            fault = "; expected from -100% to 100%"
        elif rounding and not is_percent:
            fault = f": ({rounding}) says how per cent are rounded, and there are none; remove it"
        if fault:
            raise DataError(f"dataset.split is {split!r}{fault}")
        start, stop = sides.get("start"), sides.get("stop")
        drops_remainder = rounding == "pct1_dropremainder"
        parts.append(Part(match["name"], start, stop, is_percent, drops_remainder, split))
    return tuple(parts)


# Keys of a source that say what its rows are.
_OF_ROWS = ("format", "columns", "ignore_columns", "template")


@dataclass(frozen=True)
class SourceSettings:
    """How one source is read: the recipe's keys, those of the dataset section filled in."""

    path: str
    name: str | Sequence[str] | None
    split: str
    format: str
    columns: Mapping[str, str]
    ignore_columns: Sequence[str]
    template: str
    weight: float = 1.0
    names_template: bool = False  # whether the recipe writes a template
    drops_faulty: bool = False  # whether faulty rows are left out rather than refused


def training_sources(dataset: DatasetRecipe) -> list[SourceSettings]:
    """The sources of `dataset.path`, in their order."""
    paths = dataset.path if isinstance(dataset.path, list) else [dataset.path]
    return [
        _settings(dataset, each if isinstance(each, SourceRecipe) else SourceRecipe(path=each))
        for each in paths
    ]


def validation_source(dataset: DatasetRecipe, path: str) -> SourceSettings:
    """A validation file; it belongs to no configuration or split of the training data."""
    own = SourceRecipe(path=path, split="train")
    return _settings(shared_settings(dataset).model_copy(update={"name": None}), own)


def shared_settings(dataset: DatasetRecipe) -> DatasetRecipe:
    """The dataset section for rows beside those of `path`, such as held-out ones.

    They are taken to be like the training rows: a key that the section leaves at its default is
    what all sources say, where they say the same.
    """
    sources = training_sources(dataset)
    found = {key: getattr(sources[0], key) for key in _OF_ROWS}
    fields = DatasetRecipe.model_fields
    update = {
        key: value
        for key, value in found.items()
        if getattr(dataset, key) == fields[key].default != value
        and all(getattr(each, key) == value for each in sources)
    }
    return dataset.model_copy(update=update)


def source_names(dataset: DatasetRecipe) -> str:
    """The sources as a message lists them."""
    return ", ".join(source.path for source in training_sources(dataset))


def check_ignored(found: Collection[str], settings: Sequence[SourceSettings]) -> None:
    """Refuse a column to leave out that no row has: `found` are those that some row has."""
    wanted = {name: None for each in settings for name in each.ignore_columns}
    if missing := [name for name in wanted if name not in found]:
        labels = ", ".join(each.path for each in settings)
        raise DataError(
            f"dataset.ignore_columns names {missing[0]!r}, and no row of {labels} has such a "
            "column; expected names of columns that are there: correct or remove it"
        )


def _settings(dataset: DatasetRecipe, source: SourceRecipe) -> SourceSettings:
    taken: dict[str, Any] = {
        key: getattr(dataset if getattr(source, key) is None else source, key)
        for key in ("name", "split", *_OF_ROWS)
    }
    return SourceSettings(
        path=source.path,
        weight=source.weight,
        names_template=source.template is not None or "template" in dataset.model_fields_set,
        drops_faulty=dataset.on_bad_row == "drop",
        **taken,
    )
