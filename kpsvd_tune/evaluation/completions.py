"""The file of completions: one JSON object a line, appended as soon as a completion is finished.

A row is ``{"id", "prompt", "completion", "gold"}``; ``"sample"`` joins them when a prompt is
answered several times, ``"is_cut": true`` where the answer had no room to end. No completion is
ever rewritten, so a killed run loses at most the rows that were being generated, and scoring can be
redone from the file alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import DataError
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import append_file, replace_file, truncate_file
from kpsvd_tune.storage.json_files import as_read_back, parse_json, read_bytes

RowId = int | str
# In the folder of an evaluation.
COMPLETIONS_FILE = "completions.jsonl"
SETTINGS_FILE = "evaluation.json"
POINTS_FILE = "points.json"  # what each answer was worth to the first scorer


@dataclass(frozen=True)
class Completion:
    """One answer of a model to one prompt."""

    id: RowId  # the row's own id field, or else its number in the source, from 0
    prompt: str  # the text the model was given
    completion: str  # the text the model wrote, cut before the first stop string
    gold: Any  # what the scorers compare with: a text, or for code a mapping of tests
    sample: int = 0  # which answer to this prompt it is
    is_cut: bool = False  # it did not end before its most tokens were written

    @property
    def key(self) -> tuple[RowId, int]:
        """What makes a completion unique in a file: never generated twice."""
        return self.id, self.sample

    def to_json(self) -> str:
        """The row as one line without its end."""
        usual = {"sample": 0, "is_cut": False}
        row = {key: value for key, value in asdict(self).items() if usual.get(key, ...) != value}
        return json.dumps(row, ensure_ascii=False)


def append_completion(path: Path, completion: Completion) -> None:
    """Add one row in a single write, so that processes sharing the file never mix their lines.

    The data has left this process when the call returns: a kill afterwards loses nothing.
    """
    line = _line(completion)
    with explained(f"append {len(line):,} bytes to {path}", "an --output"):
        append_file(path, line)


def repair_completions(path: Path) -> None:
    """Make a file that a kill may have torn ready for appending; other processes must wait.

    A last line that is a whole row only gets its line end; half a row is cut off.
    """
    if not path.exists():
        return
    content = read_bytes(path)
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    if _parse(content[start:]) is None:
        truncate_file(path, start)
    else:
        append_file(path, b"\n")


def renew_golds(path: Path, golds: Mapping[RowId, Any]) -> int:
    """Put right answers in place of others in a file of completions; other processes must wait.

    Args:
        path: The file; one that is missing holds none.
        golds: What the rows have now, by their ids; rows of other ids stay as they are.

    Returns:
        How many completions had another gold. The file is replaced as a whole, if any had.
    """
    if not path.exists():
        return 0
    held = read_completions(path)
    now = as_read_back([golds.get(each.id, each.gold) for each in held])
    renewed = [replace(each, gold=gold) for each, gold in zip(held, now, strict=True)]
    changed = sum(old != new for old, new in zip(held, renewed, strict=True))
    if changed:
        replace_file(path, b"".join(map(_line, renewed)))
    return changed


def read_completions(path: Path) -> list[Completion]:
    """Read all rows of a file in the order they were written.

    A torn last line is left out: it is what a kill leaves behind. Rows with one id and no
    ``sample`` are counted as samples in their order.

    Raises:
        DataError: the file is missing, or a line before the last is no JSON object, or a row has
            no ``completion`` or no ``gold``, or holds a ``completion`` that is no text, or a
            (id, sample) pair appears twice.
    """
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError as error:
        raise DataError(
            f"cannot read completions from {path}: {error.strerror or error}. Expected a file of "
            "JSON lines as an evaluation writes it (completions.jsonl)."
        ) from error
    completions: dict[tuple[RowId, int], Completion] = {}
    counts: Counter[RowId] = Counter()  # of rows without a sample number
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None:
            if number == len(lines):
                break
            raise DataError(
                f"{path} line {number} is no JSON object. Expected one row "
                '{"id", "prompt", "completion", "gold"} a line; correct or remove that line.'
            )
        completion = _to_completion(row, number, path, counts)
        if completion.key in completions:
            raise DataError(
                f"{path} line {number} is another row with id {completion.id!r} and sample "
                f"{completion.sample}. Expected each once; remove the copies, or give them "
                "different sample numbers."
            )
        completions[completion.key] = completion
    return list(completions.values())


def _line(completion: Completion) -> bytes:
    # A lone surrogate is valid in JSON but not in UTF-8; escape instead of losing the row.
    return (completion.to_json() + "\n").encode("utf-8", errors="backslashreplace")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = parse_json(line)
    except ValueError:
        return None
    return row


def _to_completion(
    row: dict[str, Any], number: int, path: Path, counts: Counter[RowId]
) -> Completion:
    missing = [key for key in ("completion", "gold") if key not in row]
    if missing or not isinstance(row["completion"], str):
        fault = (
            f"has no {' and no '.join(missing)}" if missing else "has a completion that is no text"
        )
        raise DataError(
            f"{path} line {number} {fault}. Expected a row "
            '{"id", "prompt", "completion", "gold"}; got the keys ' + ", ".join(row) + "."
        )
    identifier = row.get("id", number - 1)
    if not isinstance(identifier, int | str):
        raise DataError(f"{path} line {number}: id must be a number or a text, got {identifier!r}.")
    sample = row.get("sample")
    if not isinstance(sample, int | None) or not isinstance(row.get("prompt", ""), str):
        raise DataError(
            f"{path} line {number}: expected a text as prompt and a number as sample, got "
            f"{str(row.get('prompt'))[:40]!r} and {str(sample)[:40]!r}"
        )
    if sample is None:
        sample = counts[identifier]
        counts[identifier] += 1
    text, is_cut = row["completion"], row.get("is_cut") is True
    return Completion(identifier, row.get("prompt", ""), text, row["gold"], sample, is_cut)
