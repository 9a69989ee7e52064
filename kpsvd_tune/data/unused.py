"""Columns that no role takes: refused where they change what a row means, named where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kpsvd_tune.data.columns import column, message_kind
from kpsvd_tune.data.files import Row
from kpsvd_tune.data.format import RowFormat, several_messages
from kpsvd_tune.data.preference import check_preference
from kpsvd_tune.data.tools import TOOL_COLUMNS
from kpsvd_tune.errors import DataError

# Names by what such a column holds; lower case, without "_" and "-".
_MEDIA = {
    *("image", "images", "imageurl", "imagepath", "pixelvalues"),
    *("audio", "audios", "video", "videos"),
}
_LABELS = {"label", "labels", "ktotag", "ktolabel", "isdesirable", "desirable"}
_WEIGHTS = {"weight", "weights", "sampleweight", "lossweight", "exampleweight"}
_SWITCHES = {"train", "trainable", "istrain", "istrainable"}
# What belongs before the answer where the rows are texts.
_CONTEXT = {
    *("input", "context", "history", "passage", "document", "documents", "article", "background"),
    *("knowledge", "evidence", "schema"),
}
_SHOWN = 12


class UnusedColumns:
    """Looks at the columns that a form leaves out, row by row.

    Args:
        form: The form of the rows.
        setting: Where a user names columns.
    """

    def __init__(self, form: RowFormat, setting: str = "dataset.columns") -> None:
        self._form = form
        self._setting = setting
        self.seen: set[str] = set()
        self._settled: set[str] = set()
        self._unused: dict[str, None] = {}
        self._context: dict[str, None] = {}

    def check(self, row: Row) -> None:
        """Look at the columns of one row.

        Raises:
            DataError: A column changes what the row means, or surely belongs to the example.
        """
        for name, value in row.values.items():
            if name in self._settled:
                continue
            self.seen.add(name)
            if self._is_used(row, name):
                self._settled.add(name)
            elif value is not None and value not in ("", [], {}):
                self._judge(row, name, value)

    def notes(self) -> list[str]:
        """What a user should know about the columns of all rows looked at."""
        notes = []
        for name in self._context:
            cure = {"history": "history", "systemprompt": "system"}.get(_plain(name), "input")
            how = (
                f"to use it, give it a role in {self._setting} ({cure}: {name}, for rows of the "
                "format alpaca)"
                if not self._form.is_chat
                else "to use it, put it into a message"
            )
            notes.append(
                f"the column {name!r} looks like a part of the example and is not used: {how}; to "
                f"say that it is meant to be left out, dataset.ignore_columns: [{name}]"
            )
        if names := [name for name in self._unused if name not in self._context]:
            listed = ", ".join(names[:_SHOWN])
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            notes.append(
                f"columns that are not used: {listed}{more} (dataset.ignore_columns silences this)"
            )
        return notes

    def _is_used(self, row: Row, name: str) -> bool:
        takes = self._form.columns.values()
        if name in takes or any(
            "." in taken and taken not in row.values and taken.split(".")[0] == name
            for taken in takes
        ):
            return True
        return name in TOOL_COLUMNS and self._form.name != "text"

    def _judge(self, row: Row, name: str, value: Any) -> None:
        for refuses in _REFUSALS:
            if fault := refuses(_plain(name), value, self._form):
                raise DataError(
                    f"{row.where}: the column {name!r} {fault}; if it means nothing here, leave it "
                    f"out with dataset.ignore_columns: [{name}]"
                )
        if not self._form.is_named:
            check_preference(row, self._setting)
            if message_kind(value):
                used = [taken for taken in self._form.columns.values() if column(row, taken)]
                raise several_messages(row, [*used[:1], name], self._setting)
        if _looks_like_context(_plain(name), value) and self._form.name != "text":
            if not self._form.is_named and not self._form.is_chat:
                raise self._missing_context(row, name)
            self._context[name] = None
        self._unused[name] = None
        # The others may hold what changes a row's meaning further down.
        if _plain(name) not in _LABELS | _WEIGHTS | _SWITCHES:
            self._settled.add(name)

    def _missing_context(self, row: Row, name: str) -> DataError:
        takes = self._form.columns
        asking = takes.get("prompt", takes.get("instruction"))
        answer = takes.get("completion", takes.get("output"))
        role = "history" if _plain(name) == "history" else "input"
        named = f"instruction: {asking}, {role}: {name}, output: {answer}"
        return DataError(
            f"{row.where}: the column {name!r} looks like a part of the prompt and no role takes "
            f"it; expected every part of the example to be named: {self._setting}={{{named}}} puts "
            f"it into the prompt, dataset.ignore_columns: [{name}] leaves it out"
        )


def _looks_like_context(plain: str, value: Any) -> bool:
    if plain in ("systemprompt", "systemmessage"):
        return isinstance(value, str)
    return plain in _CONTEXT and isinstance(value, str | list | dict)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _media(plain: str, value: Any, form: RowFormat) -> str | None:
    if plain not in _MEDIA:
        return None
    return "holds images, sound or video; expected text alone, since only texts are trained here"


def _label(plain: str, value: Any, form: RowFormat) -> str | None:
    says_yes_or_no = str(value).strip().lower() in ("true", "false", "0", "1", "0.0", "1.0")
    if plain not in _LABELS or form.name == "text" or not says_yes_or_no:
        return None
    return (
        f"is {value!r}, which seems to say whether the answer is a good one (as rows for KTO do), "
        "and every answer would be learnt as a good one; expected rows with good answers only: "
        "keep those in the file"
    )


def _weight(plain: str, value: Any, form: RowFormat) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_share = is_number and (0 <= value < 1 or plain in _WEIGHTS - {"weight", "weights"})
    if plain not in _WEIGHTS or not is_share or value == 1:
        return None
    return (
        f"is {value!r}, and rows have no weights of their own here; expected weights of whole "
        "sources (weight, in dataset.path): put rows of another weight into another file"
    )


def _switch(plain: str, value: Any, form: RowFormat) -> str | None:
    if plain not in _SWITCHES or str(value).strip().lower() not in ("false", "0"):
        return None
    return f"is {value!r}, so the row is marked as not to be learnt: take such rows out of the file"


def _documents(plain: str, value: Any, form: RowFormat) -> str | None:
    if plain != "documents" or not isinstance(value, list) or not form.is_chat:
        return None
    return "holds documents beside the chat, which are not passed on; expected them in a message"


_REFUSALS: tuple[Callable[[str, Any, RowFormat], str | None], ...] = (
    _media,
    _label,
    _weight,
    _switch,
    _documents,
)
