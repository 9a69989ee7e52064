"""Rows that Arrow held: those of .parquet files and of the `datasets` library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import DataError


def without_filled_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the nulls inside its columns.

    Arrow gives all objects of a column the same keys and fills those that an object never had
    with null. Templates that write tools or the arguments of calls as JSON would write them, and
    the model would learn arguments that nobody gave.
    """
    return {name: _clean(value) for name, value in values.items()}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return value


def read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a .parquet file with their numbers, a thousand at a time in memory.

    Raises:
        DataError: It is no parquet file, is damaged, or names a column twice.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
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


def _check_columns(path: Path, names: list[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: the column {repeated[0]!r} occurs twice; expected each column once: rename "
            "or remove one"
        )
