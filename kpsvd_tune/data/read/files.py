"""Read one local file row by row: .jsonl, .json, .csv, .parquet; each fault names its line.

The first three may be compressed: .jsonl.gz, .csv.zst.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from kpsvd_tune.errors import DataError

# Columns that an example of a row shows.
_SHOWN = 4
# The number of a row with its values, or with what is wrong with it in words.
Numbered = tuple[int, dict[str, Any] | str]
_COMPRESSED = (".gz", ".zst")
_ARCHIVES = (".zip", ".tar", ".tgz", ".rar", ".7z", ".bz2", ".xz")


@dataclass(frozen=True, slots=True)
class Row:
    """One row and the place where a person finds it."""

    source: str  # file or hub dataset
    number: int  # line (.jsonl, .csv) or row (.json, .parquet, hub), counted from 1
    values: Mapping[str, Any]  # columns by name, as read
    unit: str = "line"  # what `number` counts
    fault: DataError | None = None  # why the row cannot be read

    @property
    def where(self) -> str:
        """Source and place, as error messages print it."""
        return f"{self.source}, {self.unit} {self.number}"

    @contextmanager
    def told_in_errors(self) -> Iterator[None]:
        """Put the row's place before the message of a DataError from inside."""
        try:
            yield
        except DataError as error:
            raise type(error)(f"{self.where}: {error}") from error


def suffix_of(path: Path) -> str:
    """The suffix of a file, with that before .gz or .zst."""
    return "".join(path.suffixes[-2 if path.suffix.lower() in _COMPRESSED else -1 :])


def kind_of(path: Path) -> str:
    """The suffix that tells the kind of a file, in small letters: that before .gz or .zst."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSED else suffix


def check_file(path: Path) -> None:
    """Refuse what is no file of a known kind."""
    kind, suffix = kind_of(path), path.suffix.lower()
    if kind in _ARCHIVES or suffix in _ARCHIVES:
        raise DataError(
            f"{path}: is an archive ({suffix}); expected a file of rows "
            f"({', '.join(SUFFIXES)}, also as .gz or .zst): unpack it first"
        )
    if kind not in _READERS:
        raise DataError(
            f"{path}: cannot read {suffix_of(path) or 'a file without suffix'}; expected one of "
            f"{', '.join(SUFFIXES)}, also compressed, such as .jsonl.gz or .jsonl.zst: convert "
            "the file, or rename it if only the suffix is wrong"
        )
    if kind == ".parquet" and suffix in _COMPRESSED:
        raise DataError(
            f"{path}: parquet files are compressed inside; unpack it first ({path.stem})"
        )
    if not path.is_file():
        raise DataError(_missing(path))


def row_unit(path: Path) -> str:
    """What the rows of a file are counted in: lines, or rows where it has no lines."""
    return "line" if kind_of(path) in (".jsonl", ".csv") else "row"


def read_file(path: Path) -> Iterator[Row]:
    """Read a local UTF-8 file row by row; a row that cannot be read has its `fault`.

    Blank lines are no rows; a byte order mark and all line ends are read. Memory holds one row of a
    .jsonl or .csv file, a thousand of a .parquet file, and all of a .json file. DataError: it is
    missing, of another kind, empty, or has no rows to tell apart.
    """
    check_file(path)
    unit = row_unit(path)
    is_empty = True
    try:
        for number, found in _READERS[kind_of(path)](path):
            is_empty = False
            if isinstance(found, str):
                row = Row(str(path), number, {}, unit)
                yield replace(row, fault=DataError(f"{row.where}: {found}"))
            else:
                yield Row(str(path), number, found, unit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if path.suffix.lower() == ".zst" and error.errno is None:
            raise _damaged(path, error) from error
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if is_empty:
        raise DataError(f"{path}: holds no rows; expected at least one")


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot be unpacked ({error}); expected whole {path.suffix} data: fetch or write "
        f"it again, or rename it to {path.stem} if it is not compressed"
    )


def _open(path: Path) -> BinaryIO:
    """A file's bytes, unpacked where its suffix says that it is compressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow  # type: ignore[import-untyped]

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return cast(BinaryIO, io.BufferedReader(stream))
    return path.open("rb")


def parse_json(text: str) -> Any:
    """`json.loads` that refuses an object with the same key twice instead of keeping the last.

    Raises ValueError, also for nesting too deep; a position counts from this text's start.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeats)
    except RecursionError as error:
        raise ValueError("the nesting is too deep to read") from error


def parsed(value: Any) -> Any:
    """What a text says where it is JSON, as in csv files and columns of Arrow; else the value."""
    if isinstance(value, str):
        with suppress(ValueError):
            return parse_json(value)
    return value


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(
            f"the key {_repeated([key for key, _ in pairs])!r} occurs twice in one object: keep "
            "one of the two, it is unclear which one is meant"
        )
    return values


def _repeated(names: Sequence[str]) -> str | None:
    """The first name that occurs twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path}: is a folder; expected a file"
    siblings = sorted(p.name for p in path.parent.glob("*") if kind_of(p) in _READERS)
    cure = f"that folder has {', '.join(siblings[:5])}" if siblings else "check the path"
    return f"{path}: there is no such file (looked from {Path.cwd()}); {cure}"


def _read_text(path: Path, newline: str | None) -> Iterator[str]:
    """The lines of a text file with their ends; `newline` as :func:`open` takes it."""
    with _open(path) as stream:
        head = stream.read(4)
    for start, found, cure in _FOREIGN_STARTS:
        if head.startswith(start):
            raise DataError(f"{path}: is {found}; expected UTF-8 text: {cure}")
    if b"\0" in head:
        raise DataError(
            f"{path}: starts with NUL bytes, as UTF-16 text or a binary file does; expected UTF-8 "
            "text: save it with that encoding"
        )
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline=newline) as lines:
            yield from lines
    except UnicodeDecodeError as error:
        # The decoder knows its place in a block of the file only.
        line, byte = _foreign_byte(path)
        raise DataError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; expected UTF-8 "
            "text: save the file with that encoding"
        ) from error


def _foreign_byte(path: Path) -> tuple[int, int]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number, line[error.start]
    raise AssertionError("the file changed while it was read")


def _read_jsonl(path: Path) -> Iterator[Numbered]:
    names: Sequence[str] = ("prompt", "completion")
    # newline=None: any line end ends a row, since JSON writes those inside a text as \\n and \\r.
    for number, line in enumerate(_read_text(path, newline=None), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
            found = _object(values, _line_cure(values))
            if isinstance(found, dict) and found:
                names = list(found)
        except ValueError as error:
            found = (
                f"{_json_fault(error)}; expected one JSON object a line, such as "
                f"{_example(names)}; found {shortened(line.strip(), 60)!r}: correct the line, or "
                "remove it"
            )
        yield number, found


def _example(names: Sequence[str]) -> str:
    """A row with these columns, the first few of many."""
    shown = ", ".join(f'{json.dumps(name, ensure_ascii=False)}: "..."' for name in names[:_SHOWN])
    return f"{{{shown}{', ...' * (len(names) > _SHOWN)}}}"


def _line_cure(values: Any) -> str:
    """What to do with a line of a .jsonl file that is an array."""
    if not isinstance(values, list):
        return ""
    if values and isinstance(values[0], dict) and {"role", "from"} & set(values[0]):
        return '; if each line is a chat, write {"messages": [...]} around each'
    return "; rename the file to .json if it is one array of rows"


def _read_json(path: Path) -> Iterator[Numbered]:
    text = "".join(_read_text(path, newline=""))
    if not text.strip():
        return
    try:
        content = parse_json(text)
    except ValueError as error:
        extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        cure = ": rename it to .jsonl if it has one object a line" if extra else ""
        raise DataError(
            f"{path}: {_json_fault(error)}; expected one JSON array of objects{cure}"
        ) from error
    if isinstance(content, dict):
        raise DataError(
            f"{path}: expected a JSON array of objects, found one object with the keys "
            f"{', '.join(content)}{_json_cure(content)}"
        )
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a JSON array of objects, found {_kind(content)}")
    for number, values in enumerate(content, start=1):
        yield number, _object(values)


def _json_cure(content: Mapping[str, Any]) -> str:
    """What to do with a .json file that holds one object."""
    arrays = {key: value for key, value in content.items() if isinstance(value, list)}
    rows = [
        key
        for key, value in arrays.items()
        if not value or (isinstance(value[0], dict) and not {"role", "from"} & set(value[0]))
    ]
    if rows:
        return f"; save the array under {rows[0]!r} as the whole file"
    if len(arrays) > 1 and len(arrays) == len(content):
        return "; these seem to be columns: write one object for each row"
    if content and all(isinstance(value, dict) for value in content.values()):
        return "; these seem to be rows by number: save them as an array, without the numbers"
    return "; if this is one row, write [...] around it"


def _object(values: Any, cure: str = "") -> dict[str, Any] | str:
    """The values, or in words that they are no JSON object."""
    if isinstance(values, dict):
        return values
    return f"expected a JSON object (columns by name), found {_kind(values)}{cure}"


def _read_csv(path: Path) -> Iterator[Numbered]:
    # The library's own limit is 131,072 characters, and long texts are what csv files hold here.
    csv.field_size_limit(2**31 - 1)
    # newline="": csv sees the line ends itself and keeps those inside quotes.
    lines = _read_text(path, newline="")
    first = next(lines, "")
    # A first line such as sep=; tells Excel the separator of the lines that follow.
    told = re.fullmatch(r'"?sep=([,;\t|])"?\s*', first, re.IGNORECASE)
    separator = told[1] if told else ","
    names = first.split(separator)
    # A header such as `prompt, completion`: the space belongs to the separator.
    is_spaced = len(names) > 1 and all(name.startswith(" ") for name in names[1:])
    header: list[str] | None = None
    taken: list[str] = []  # the lines of one record as they stand in the file
    start = before = 2 if told else 1
    reader = csv.reader(
        _recorded(lines if told else chain([first], lines), taken),
        delimiter=separator,
        skipinitialspace=is_spaced,
        strict=True,
    )
    try:
        for fields in reader:
            number, start = start, reader.line_num + before
            record, taken[:] = list(taken), []
            if not any(field.strip() for field in fields):
                continue
            quoted = _quote_behind_spaces(fields, record, separator)
            if header is None:
                if quoted:
                    raise DataError(f"{path}, line {number}: {quoted}")
                header = _csv_header(path, fields)
            elif quoted:
                yield number, quoted
            elif len(fields) != len(header):
                yield (
                    number,
                    f"found {len(fields)} fields, expected {len(header)} ({', '.join(header)}): "
                    'put double quotes (") around a text with a comma in it',
                )
            else:
                yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}: not valid csv: {error}; expected comma-separated fields, "
            'a text with commas or quotes in double quotes, each quote in it doubled ("")'
        ) from error


def _recorded(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _quote_behind_spaces(fields: list[str], record: list[str], separator: str) -> str:
    """The fault that a field's quotes are not at its start, so that csv takes them for text."""
    for place, field in enumerate(fields):
        if field[:1] == " " and field.lstrip(" ").startswith('"'):
            # In `" ""a"""` space and quotes are the text; in ` "a"` they only surround it.
            other = next(csv.reader(record, delimiter=separator, skipinitialspace=True))
            if other[place : place + 1] != [field]:
                return (
                    f"a field has spaces before its quotes ({shortened(field.strip(), 40)!r}), so "
                    "the quotes would be learnt as a part of the text; expected quotes right "
                    "behind the separator: remove the spaces (pandas reads such files with "
                    "skipinitialspace=True)"
                )
    return ""


def _csv_header(path: Path, fields: list[str]) -> list[str]:
    header = [field.strip() for field in fields]
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and delimiter in header[0]:
            raise DataError(
                f"{path}, line 1: the header {header[0]!r} is separated by {name}; expected "
                "commas: export the file as comma-separated values"
            )
    _check_distinct(header, f"{path}, line 1", " in the header")
    return header


def _check_distinct(names: list[str], place: str, where: str = "") -> None:
    if (repeated := _repeated(names)) is not None:
        raise DataError(
            f"{place}: the column {repeated!r} occurs twice{where}; expected each column once: "
            "rename or remove one"
        )


def _json_fault(error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
    return f"not valid JSON at {place} ({error.msg})"


def _kind(value: Any) -> str:
    names = {list: "an array", dict: "an object", str: "a text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def shortened(text: str, length: int) -> str:
    """A text as messages show it, with dots for what is beyond a length."""
    return text if len(text) <= length else text[: length - 3] + "..."


def without_filled_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the nulls inside its columns, with which Arrow gives all objects the same keys.

    Templates would write them as JSON, and the model would learn arguments that nobody gave.
    """
    return {name: _clean(value) for name, value in values.items()}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return value


def _read_parquet(path: Path) -> Iterator[Numbered]:
    """The rows of a .parquet file with their numbers, a thousand at a time in memory."""
    import pyarrow
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_distinct(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1000):
                for values in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield number, without_filled_nulls(values)
    except KeyError as error:  # of a column of maps
        raise DataError(
            f"{path}, behind row {number}: {error.args[0]} Expected each key of a map once: mend "
            "the row"
        ) from error
    # Besides its own errors: text that is not UTF-8, and dates that Python has no value for.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: not a readable parquet file behind row {number}: {error}; write it anew, "
            "with texts in UTF-8"
        ) from error


_FOREIGN_STARTS = (
    (codecs.BOM_UTF32_LE, "UTF-32 text", "save it with that encoding"),
    (codecs.BOM_UTF16_LE, "UTF-16 text", "save it with that encoding"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "save it with that encoding"),
    (b"\x1f\x8b", "compressed by gzip", "add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "add .zst to its name"),
    (b"PK\x03\x04", "a zip archive or spreadsheet", "unpack or export it first"),
    (b"PAR1", "a parquet file", "rename it to .parquet"),
)
_READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
