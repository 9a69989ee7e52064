"""Refuse rows that hold a preferred and a rejected answer: only one of them is to be learnt."""

from __future__ import annotations

import re
from typing import Any

from kpsvd_tune.data.read.columns import message_kind
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.errors import DataError

_REJECTED = re.compile(r"(.*[_-])?rejected([_-].*)?", re.IGNORECASE)
_CHOSEN = re.compile(r"(.*[_-])?chosen([_-].*)?", re.IGNORECASE)


def check_preference(row: Row, setting: str) -> None:
    """Refuse a row with a rejected answer.

    Args:
        row: The row.
        setting: Where a user names columns.

    Raises:
        DataError: The row holds one; the message says how to learn the preferred answer.
    """
    rejected = _answer(row, _REJECTED)
    if rejected is None:
        return
    chosen = _answer(row, _CHOSEN)
    names = f"{chosen!r} and {rejected!r}" if chosen else repr(rejected)
    raise DataError(
        f"{row.where}: {'columns' if chosen else 'the column'} {names}: these are rows of "
        "preferences, and this tool learns answers as they are (supervised fine-tuning); expected "
        f"one answer a row: {_cure(row, chosen, rejected, setting)}"
    )


def _answer(row: Row, pattern: re.Pattern[str]) -> str | None:
    """The first column of such a name with an answer in it, rather than its score."""
    return next(
        (
            name
            for name, value in row.values.items()
            if pattern.fullmatch(name) and value and isinstance(value, str | list | dict)
        ),
        None,
    )


def _cure(row: Row, chosen: str | None, rejected: str, setting: str) -> str:
    if chosen is None:
        return f"leave the other out with dataset.ignore_columns: [{rejected}]"
    value: Any = row.values[chosen]
    kind = message_kind(value, may_be_single=True)
    before = next(
        (
            name
            for name in ("prompt", "messages", "conversations", "question", "instruction", "input")
            if row.values.get(name)
        ),
        None,
    )
    starts_with_answer = kind is not None and _first_speaker(value) in ("assistant", "gpt")
    if kind is not None and not starts_with_answer:
        role = "messages" if kind == "chat" else "conversations"
        columns = f"{role}: {chosen}"
    elif kind is not None and before is not None and message_kind(row.values[before]) is None:
        return (
            f"write {before!r} as [{{'role': 'user', 'content': ...}}], and then "
            f"{setting}={{prompt: {before}, completion: {chosen}}} learns the preferred one"
        )
    elif before is not None:
        columns = f"prompt: {before}, completion: {chosen}"
    else:
        columns = f"text: {chosen}"
    return f"to learn the preferred one, write {setting}={{{columns}}}"


def _first_speaker(value: Any) -> Any:
    first = value[0] if isinstance(value, list) else value
    return (first.get("role") or first.get("from")) if isinstance(first, dict) else None
