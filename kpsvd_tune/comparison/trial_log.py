"""The folder of a comparison: what its trials share, and the rows of those that are done."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

# pydantic asks for typing_extensions' TypedDict below Python 3.12, and depends on that package.
from typing_extensions import TypedDict

from kpsvd_tune.errors import CheckpointError, InputError
from kpsvd_tune.report.comparison import Trial, TrialRow
from kpsvd_tune.runs.identity import changes, describe, words_of
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import append_file, replace_file, sync_file, truncate_file
from kpsvd_tune.storage.json_files import as_read_back, parse_json, read_bytes, read_json, to_json
from kpsvd_tune.storage.locks import hold

RESULTS = "results.jsonl"
COMPARISON = "compare.json"
# How a trial warms up. Comparisons of versions that wrote nothing down have another way.
SCHEDULE = "the first step of a warm-up has a rate"


class _Shared(TypedDict, total=False):
    """What compare.json holds; keys of other versions stay as they are."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    shared: dict[str, Any]
    methods: dict[str, dict[str, Any]]


def open_results(
    folder: Path,
    shared: Mapping[str, Any],
    adapters: Mapping[str, Any],
    *,
    has_workers: bool = False,
) -> list[TrialRow]:
    """Give the rows that are done, and refuse a folder of trials that are not comparable.

    A folder without a finished trial holds nothing to protect, and takes the settings of now, but
    not where it `has_workers`, which may be in their first trials. A CheckpointError says that
    rows, model, loop or a method's settings were others: ``shared`` is what is equal in all trials,
    ``adapters`` has each KPSVD method's adapter section by its name.
    An InputError says that a line of results.jsonl is no row.
    """
    file, results = folder / COMPARISON, folder / RESULTS
    with _locked(folder):
        rows = _read(results)
    # By way of JSON, for what was read back must equal what was not.
    now = as_read_back({"shared": dict(shared), "methods": dict(adapters), "schedule": SCHEDULE})
    if file.exists() and (rows or has_workers):
        earlier = read_json(file, _Shared)
        known = {**now["methods"], **earlier.get("methods", {})}
        found = changes(earlier.get("shared", {}), now["shared"])
        for name, adapter in now["methods"].items():
            if has_workers or any(row.method == name for row in rows):
                own = changes(known[name], adapter)
                found |= {f"{name}: adapter.{key}": change for key, change in own.items()}
        if found:
            undo = " ".join(words_of({key: old for key, (old, _) in found.items()}))
            raise CheckpointError(
                f"{folder} holds a comparison with other settings:\n{describe(found)}\n"
                "Its trials cannot be compared with new ones: "
                f"{f'write {undo} again' if undo else 'undo the change'}, or choose another "
                "output_dir"
            )
        now["methods"] = {**earlier.get("methods", {}), **now["methods"]}
        now["schedule"] = earlier.get("schedule")
    elif file.exists():
        # What was measured of the base model belongs to the settings that go.
        for name in ("base.json", "base_score.json"):
            (folder / name).unlink(missing_ok=True)
    replace_file(file, to_json(now))
    return rows


def check_schedule(folder: Path) -> None:
    """Refuse more trials beside those of an earlier version, whose warm-up began at rate 0."""
    if read_json(folder / COMPARISON).get("schedule") != SCHEDULE:
        raise CheckpointError(
            f"{folder} holds trials of an earlier version, whose warm-up gave the first step no "
            "rate; new ones cannot be compared with them: choose another output_dir, or judge "
            "those that are there with --plan done"
        )


def append_row(folder: Path, row: TrialRow) -> None:
    """Add the row of a finished trial; it is on the disk when this returns."""
    line = json.dumps(row.to_dict(), allow_nan=False) + "\n"
    with _locked(folder):
        # A worker that was killed in its line may have left a half of one.
        _cut(folder / RESULTS)
        append_file(folder / RESULTS, line.encode())
        sync_file(folder / RESULTS)


def read_results(folder: Path) -> list[TrialRow]:
    """Give the rows that are done, and change nothing; none where there is no such folder."""
    file = folder / RESULTS
    if not file.exists():
        return []
    content = read_bytes(file)
    return _rows(file, content[: content.rfind(b"\n") + 1])


def _read(file: Path) -> list[TrialRow]:
    return _rows(file, _cut(file)) if file.exists() else []


def _cut(file: Path) -> bytes:
    """The whole lines of a file; half a line, which a crash can leave behind, is cut off.

    Its trial is asked for its row again.
    """
    if not file.exists():
        return b""
    content = read_bytes(file)
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        truncate_file(file, len(whole))
    return whole


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time reads to write, of all that share the folder."""
    file = folder / ".results.lock"
    with explained(f"lock {file}"), hold(file, wait=True):
        yield


def _rows(file: Path, whole: bytes) -> list[TrialRow]:
    """The rows of whole lines; a trial that was scored later has a second line, which counts."""
    rows: dict[Trial, TrialRow] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = TrialRow.from_dict(parse_json(line))
        except (ValueError, InputError) as error:
            raise InputError(
                f"{file}:{number} is no row of a trial ({error}); remove the line, and its trial "
                "is run again"
            ) from error
        rows[row.trial] = row
    return list(rows.values())
