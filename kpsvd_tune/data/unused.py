"""Columns that no role takes: refused where they change what a row means, named where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kpsvd_tune.data.columns import (
    CONTEXT_NAMES,
    SYSTEM_NAMES,
    column,
    is_empty,
    message_kind,
    nearest,
    plain_name,
)
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
_VERDICTS = {"iscorrect", "correct", "isgood", "isvalid", "accepted", "isaccepted"}
_WEIGHTS = {"weight", "weights", "sampleweight", "lossweight", "exampleweight"}
_SWITCHES = {"train", "trainable", "istrain", "istrainable"}
_MASKS = {"mask", "lossmask", "completionmask", "assistantmasks", "assistantmask"}
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
        # Objects that "a.b" reaches into: what else is in them is looked at like other columns.
        self._opened = {
            ".".join(parts[:depth])
            for parts in (taken.split(".") for taken in form.columns.values())
            for depth in range(1, len(parts))
        }
        self._settled: set[str] = set()
        self._unused: dict[str, None] = {}
        self._context: dict[str, None] = {}

    def check(self, row: Row) -> None:
        """Look at the columns of one row.

        Raises:
            DataError: A column changes what the row means, or surely belongs to the example.
        """
        for name, plain, value in self._columns(row):
            if name in self._settled:
                continue
            if self._is_used(name):
                self._settled.add(name)
            elif not is_empty(value):
                self._judge(row, name, plain, value)

    def notes(self) -> list[str]:
        """What a user should know about the columns of all rows looked at."""
        notes = []
        for name in self._context:
            how = (
                "put it into a message"
                if self._form.is_chat and _last(name) not in SYSTEM_NAMES
                else f"write {self._setting}={{{self._mapping(name)}}}"
            )
            notes.append(
                f"the column {name!r} looks like a part of the example and is not used: to use it, "
                f"{how}; to leave it out knowingly, dataset.ignore_columns: [{name}]"
            )
        if names := [name for name in self._unused if name not in self._context]:
            listed = ", ".join(name or "'' (a column without a name)" for name in names[:_SHOWN])
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            notes.append(
                f"columns that are not used: {listed}{more} (dataset.ignore_columns silences this)"
            )
        return notes

    def _columns(self, row: Row) -> Iterator[tuple[str, str, Any]]:
        """Name, plain name and value of each column, and of what is in an object reached into."""
        for name, value in row.values.items():
            if name in self._opened and isinstance(value, Mapping):
                yield from self._inside(name, value)
            else:
                yield name, plain_name(name), value

    def _inside(self, path: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
        for key, value in values.items():
            name = f"{path}.{key}"
            if name in self._opened and isinstance(value, Mapping):
                yield from self._inside(name, value)
            else:
                yield name, plain_name(key), value

    def _is_used(self, name: str) -> bool:
        if name in self._form.columns.values():
            return True
        return name in TOOL_COLUMNS and self._form.name != "text"

    def _judge(self, row: Row, name: str, plain: str, value: Any) -> None:
        if name not in row.values and plain in TOOL_COLUMNS and self._form.name != "text":
            raise DataError(
                f"{row.where}: {name!r} holds tools, which are read from a column of the row "
                f"alone; expected them in a column 'tools': move them there, or leave them out "
                f"with dataset.ignore_columns: [{name}]"
            )
        for refuses in _REFUSALS:
            if fault := refuses(plain, value, self._form):
                raise DataError(
                    f"{row.where}: the column {name!r} {fault}; if it means nothing here, leave it "
                    f"out with dataset.ignore_columns: [{name}]"
                )
        if not self._form.is_named:
            check_preference(row, self._setting)
            if message_kind(value):
                raise self._unused_messages(row, name)
            self._check_plain_text(row, name)
        if _looks_like_context(plain, value) and self._form.name != "text":
            if not self._form.is_named and not self._form.is_chat:
                raise self._missing_context(row, name)
            self._context[name] = None
        self._unused[name] = None
        # The others may hold what changes a row's meaning further down.
        if plain not in _LABELS | _VERDICTS | _WEIGHTS | _SWITCHES:
            self._settled.add(name)

    def _check_plain_text(self, row: Row, name: str) -> None:
        """Refuse what a first row would have been refused for, in a later row of plain text."""
        is_found = self._form.name == "text" and not self._form.is_format_named
        if is_found and any(nearest(role, [name]) for role in ("prompt", "completion")):
            raise DataError(
                f"{row.where}: the column {name!r} looks like a prompt or an answer, and earlier "
                "rows hold plain text alone; expected rows of one form: make a file of each form, "
                f"or leave it out with dataset.ignore_columns: [{name}]"
            )

    def _unused_messages(self, row: Row, name: str) -> DataError:
        used = [taken for taken in self._form.columns.values() if message_kind(column(row, taken))]
        if used:
            return several_messages(row, [*used[:1], name], self._setting)
        return DataError(
            f"{row.where}: the column {name!r} holds messages, and earlier rows have the form "
            f"{self._form.name}, which does not use it; expected rows of one form: make a file of "
            f"each form, or leave it out with dataset.ignore_columns: [{name}]"
        )

    def _missing_context(self, row: Row, name: str) -> DataError:
        taken = self._form.columns.get("input")
        cure = (
            f"join it with {taken!r}"
            if taken is not None and row.values.get(taken)
            else f"{self._setting}={{{self._mapping(name)}}} puts it into the prompt"
        )
        return DataError(
            f"{row.where}: the column {name!r} looks like a part of the prompt and no role takes "
            f"it; expected every part of the example to have one: {cure}, and "
            f"dataset.ignore_columns: [{name}] leaves it out"
        )

    def _mapping(self, name: str) -> str:
        takes = dict(self._form.columns)
        if _last(name) in SYSTEM_NAMES:
            takes["system"] = name
        else:
            renamed = {"prompt": "instruction", "completion": "output"}
            takes = {renamed.get(role, role): taken for role, taken in takes.items()}
            takes = {
                role: taken for role, taken in takes.items() if role in ("instruction", "output")
            }
            takes["history" if _last(name) == "history" else "input"] = name
        return ", ".join(f"{role}: {taken}" for role, taken in takes.items())


def _last(name: str) -> str:
    """The plain name of a column, or of the last key of a path."""
    return plain_name(name.split(".")[-1])


def _looks_like_context(plain: str, value: Any) -> bool:
    if plain in SYSTEM_NAMES:
        return isinstance(value, str)
    return plain in CONTEXT_NAMES and isinstance(value, str | list | dict)


def _media(plain: str, value: Any, form: RowFormat) -> str | None:
    if plain not in _MEDIA:
        return None
    return "holds images, sound or video; expected text alone, since only texts are trained here"


def _label(plain: str, value: Any, form: RowFormat) -> str | None:
    if plain in _LABELS and isinstance(value, list) and False in _booleans(value):
        return (
            f"is {str(value)[:60]}, so a part of the answer seems to be wrong, and would be learnt "
            "like the others; expected rows with good answers only"
        )
    says_yes_or_no = str(value).strip().lower() in ("true", "false", "0", "1", "0.0", "1.0")
    if plain not in _LABELS or form.name == "text" or not says_yes_or_no:
        return None
    return (
        f"is {value!r}, which seems to say whether the answer is a good one (as rows for KTO do), "
        "and every answer would be learnt as a good one; expected rows with good answers only: "
        "keep those in the file"
    )


def _booleans(values: list[Any]) -> list[bool]:
    return [value for value in values if isinstance(value, bool)]


def _verdict(plain: str, value: Any, form: RowFormat) -> str | None:
    if plain not in _VERDICTS or str(value).strip().lower() != "false":
        return None
    return (
        f"is {value!r}, so the answer seems to be a bad one, and would be learnt like the others; "
        "expected rows with good answers only: take such rows out of the file"
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


def _mask(plain: str, value: Any, form: RowFormat) -> str | None:
    if plain not in _MASKS or not isinstance(value, list):
        return None
    return (
        "says token by token what is learnt; expected that to follow from roles, or from weight or "
        "train of a message"
    )


def _template(plain: str, value: Any, form: RowFormat) -> str | None:
    if plain not in ("chattemplate", "chattemplatekwargs"):
        return None
    return (
        "changes how the chat template writes this row; expected one way for all rows: "
        "dataset.chat_template and dataset.template_arguments"
    )


def _documents(plain: str, value: Any, form: RowFormat) -> str | None:
    if plain != "documents" or not isinstance(value, list) or not form.is_chat:
        return None
    return "holds documents beside the chat, which are not passed on; expected them in a message"


_REFUSALS: tuple[Callable[[str, Any, RowFormat], str | None], ...] = (
    _media,
    _label,
    _verdict,
    _weight,
    _switch,
    _mask,
    _template,
    _documents,
)
