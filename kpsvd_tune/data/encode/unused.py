"""Columns that no role takes: refused if they change what a row means, else named in a note."""

from __future__ import annotations

from typing import Any

from kpsvd_tune.data.encode.format import RowFormat, several_messages
from kpsvd_tune.data.encode.tools import TOOL_COLUMNS
from kpsvd_tune.data.read.columns import (
    CONTEXT_NAMES,
    SYSTEM_NAMES,
    check_preference,
    column,
    ends_with_question,
    is_empty,
    message_kind,
    naming,
    nearest,
    plain_name,
)
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.errors import DataError, some_of

# Names by what such a column holds; lower case, without "_" and "-".
_MEDIA = {
    *("image", "images", "imageurl", "imagepath", "pixelvalues"),
    *("audio", "audios", "video", "videos"),
}
_LABELS = {"label", "labels", "ktotag", "ktolabel", "isdesirable", "desirable"}
_VERDICTS = {"iscorrect", "correct", "isgood", "isvalid", "accepted", "isaccepted"}
_GRADES = {
    *("good", "bad", "yes", "no", "desirable", "undesirable", "chosen", "rejected"),
    *("correct", "incorrect", "right", "wrong", "accepted", "acceptable", "unacceptable"),
}
_SPLITS = {"split", "datasplit", "set", "subset", "fold", "partition"}
# Set to true for rows that are not meant for training, and states that say the same.
_EXCLUDED = {
    *("deleted", "isdeleted", "discarded", "isdiscarded", "removed", "spam", "isspam"),
    *("istest", "isvalidation", "isheldout", "heldout"),
}
_STATES = {"status", "state", "reviewstatus"}
_EXCLUDED_STATES = {"discarded", "deleted", "rejected", "removed", "spam"}
_HELD_OUT = {
    *("test", "testing", "eval", "evaluation", "validation", "validate", "valid", "val", "dev"),
    *("holdout", "heldout"),
}
_WEIGHTS = {"weight", "weights", "sampleweight", "lossweight", "exampleweight"}
_SWITCHES = {"train", "trainable", "istrain", "istrainable"}
_TOOLS = {
    *("tools", "functions", "toollist", "toolslist", "availabletools", "availablefunctions"),
    *("tooldefinitions", "toolschemas", "functionlist", "functionschemas"),
}
_MASKS = {"mask", "lossmask", "completionmask", "assistantmasks", "assistantmask"}
# Plain names of columns that hold the answer to a chat that ends with a question.
_ANSWERS = {
    *("completion", "answer", "response", "output", "target", "reply", "assistant", "choices"),
    *("groundtruth", "reference", "modelresponse", "finalanswer", "solution", "generation"),
}
# Columns of these names are looked at in every row: a later value may change its meaning.
_TELLING = _ANSWERS | _LABELS | _VERDICTS | _WEIGHTS | _SWITCHES | _SPLITS | _EXCLUDED | _STATES
_SHOWN = 12
_SETTING = "dataset.columns"


class UnusedColumns:
    """Looks at the columns that a form leaves out, row by row."""

    def __init__(self, form: RowFormat) -> None:
        self._form = form
        self._settled: set[str] = set()
        self._unused: dict[str, None] = {}
        self._context: dict[str, None] = {}
        self._splits: dict[str, bool] = {}

    def check(self, row: Row) -> None:
        """Look at a row; DataError where a column changes its meaning or surely belongs to it."""
        with row.told_in_errors():
            for name, value in row.values.items():
                self._look_at(row, name, value)

    def _look_at(self, row: Row, name: str, value: Any) -> None:
        """Look at a column, or at a key of an object of which others are taken ("data.label")."""
        taken = self._form.columns.values()
        if name in self._settled:
            return
        if any(each not in row.values and each.startswith(f"{name}.") for each in taken):
            for key, inner in value.items() if isinstance(value, dict) else ():
                self._look_at(row, f"{name}.{key}", inner)
        elif name in taken or (name in TOOL_COLUMNS and self._form.name != "text"):
            self._settled.add(name)
        elif not is_empty(value):
            self._judge(row, name, value)

    def check_question(self, row: Row) -> None:
        """Refuse a column that belongs to what is asked, where the columns are not named.

        For rows that are scored: nothing is learnt from their other columns.
        """
        if self._form.is_named or self._form.is_chat or self._form.name == "text":
            return
        taken = {*self._form.columns.values(), *TOOL_COLUMNS}
        for name, value in row.values.items():
            if (
                name not in taken
                and not is_empty(value)
                and _looks_like_context(_last(name), value)
            ):
                raise DataError(
                    f"{row.where}: the column {name!r} {self._fault_of_context(row, name)}"
                    f"{_leaving_out(name)}"
                )

    def notes(self) -> list[str]:
        """What a user should know about the columns of all rows looked at."""
        notes = []
        for name in self._context:
            how = (
                "put it into a message"
                if self._form.is_chat and _last(name) not in SYSTEM_NAMES
                else f"write {self._naming(name)}"
            )
            notes.append(
                f"the column {name!r} looks like a part of the example and is not used: to use it, "
                f"{how}; to leave it out knowingly, dataset.ignore_columns: [{name}]"
            )
        if names := [name for name in self._unused if name not in self._context]:
            listed = some_of([name or "'' (a column without a name)" for name in names], _SHOWN)
            notes.append(
                f"columns that are not used: {listed} (dataset.ignore_columns silences this)"
            )
        return notes

    def _judge(self, row: Row, name: str, value: Any) -> None:
        plain, form = _last(name), self._form
        is_context = form.name != "text" and _looks_like_context(plain, value)
        fault = (
            self._fault_of_split(name, plain, value)
            or _fault_of_kind(plain, value, form)
            or _fault_of_row(plain, value, form)
        )
        if not fault and not form.is_named:
            fault = self._fault_of_answer(row, plain)
        if not fault and not form.is_named:
            check_preference(row, _SETTING)
            fault = self._fault_of_form(row, name, value)
        if not fault and is_context and not (form.is_named or form.is_chat):
            fault = self._fault_of_context(row, name)
        if fault:
            raise DataError(f"the column {name!r} {fault}{_leaving_out(name)}")
        if is_context:
            self._context[name] = None
        self._unused[name] = None
        if plain not in _TELLING:
            self._settled.add(name)

    def _fault_of_split(self, name: str, plain: str, value: Any) -> str | None:
        """Refuse rows of several splits in one file; a file of one split is what a user chose."""
        if plain not in _SPLITS or not isinstance(value, str):
            return None
        is_held_out = value.strip().lower() in _HELD_OUT
        if self._splits.setdefault(name, is_held_out) == is_held_out:
            return None
        return (
            f"is {value!r} and earlier rows are of another split, so rows for tests would be "
            "learnt with the others; expected one split in a file: make a file of each "
            "(dataset.validation takes the held-out one)"
        )

    def _fault_of_answer(self, row: Row, plain: str) -> str | None:
        """Refuse an answer beside a chat that ends with a question: it would not be learnt."""
        taken = self._form.columns.get("messages") or self._form.columns.get("conversations")
        if plain not in _ANSWERS or taken is None or not ends_with_question(column(row, taken)):
            return None
        return (
            f"seems to hold the answer to the chat in {taken!r}, which ends without an answer, and "
            "would not be learnt; expected it as the chat's last message: put it there"
        )

    def _fault_of_form(self, row: Row, name: str, value: Any) -> str | None:
        """Refuse what would have given the first row another form."""
        form = self._form
        if message_kind(value):
            for taken in form.columns.values():
                if message_kind(column(row, taken)):
                    raise several_messages(row, [taken, name], _SETTING)
            return (
                f"holds messages, and other rows have the form {form.name}, which does not use it; "
                "expected rows of one form: make a file of each form"
            )
        is_found = form.name == "text" and not form.is_format_named
        if is_found and any(nearest(role, [name]) for role in ("prompt", "completion")):
            return (
                "looks like a prompt or an answer, and earlier rows hold plain text alone; "
                "expected rows of one form: make a file of each form"
            )
        return None

    def _fault_of_context(self, row: Row, name: str) -> str:
        taken = self._form.columns.get("input")
        cure = f"{self._naming(name)} puts it into the prompt"
        if taken is not None and row.values.get(taken):
            cure = f"join it with {taken!r}"
        return (
            "looks like a part of the prompt and no role takes it; expected every part of the "
            f"example to have one: {cure}"
        )

    def _naming(self, name: str) -> str:
        """The override that gives the columns of all roles, this one among them."""
        takes = dict(self._form.columns)
        if _last(name) in SYSTEM_NAMES:
            takes["system"] = name
        else:
            alpaca = {"prompt": "instruction", "completion": "output"}
            named = {alpaca.get(role, role): taken for role, taken in takes.items()}
            takes = {role: named[role] for role in named if role in alpaca.values()}
            takes["history" if _last(name) == "history" else "input"] = name
        return naming("dataset.columns", takes)


def _leaving_out(name: str) -> str:
    return f"; if it means nothing here, leave it out with dataset.ignore_columns: [{name}]"


def _last(name: str) -> str:
    """The plain name of a column, or of the last key of a path."""
    return plain_name(name.rpartition(".")[2])


def _looks_like_context(plain: str, value: Any) -> bool:
    if plain in SYSTEM_NAMES:
        return isinstance(value, str)
    return plain in CONTEXT_NAMES and isinstance(value, str | list | dict)


def _fault_of_kind(plain: str, value: Any, form: RowFormat) -> str | None:
    """What is wrong with a column that holds something which cannot be used here."""
    is_several = isinstance(value, list | dict)
    if plain in _MEDIA:
        return "holds images, sound or video; expected text alone, since only texts are trained"
    if plain in _MASKS and isinstance(value, list):
        return (
            "says token by token what is learnt; expected that to follow from roles, or from "
            "weight or train of a message"
        )
    if plain in ("chattemplate", "chattemplatekwargs"):
        return (
            "changes how the chat template writes this row; expected one way for all rows: "
            "dataset.chat_template and dataset.template_arguments"
        )
    if plain == "documents" and isinstance(value, list) and form.is_chat:
        return (
            "holds documents beside the chat, which are not passed on; expected them in a message"
        )
    if plain in _TOOLS and (is_several or isinstance(value, str)) and form.is_chat:
        return (
            "seems to hold the tools of the chat, which would be learnt without them; expected "
            "them in a column 'tools' of the row: rename it"
        )
    return None


def _fault_of_row(plain: str, value: Any, form: RowFormat) -> str | None:
    """What is wrong with a column that says how good, or how much to be learnt, a row is."""
    text = str(value).strip().lower()
    if plain in _LABELS and isinstance(value, list) and any(each is False for each in value):
        return (
            f"is {str(value)[:60]}, so a part of the answer seems to be wrong, and would be learnt "
            "like the others; expected rows with good answers only"
        )
    says_yes_or_no = text in ("true", "false", "0", "1", "0.0", "1.0") or text in _GRADES
    if plain in _LABELS and form.name != "text" and says_yes_or_no:
        return (
            f"is {value!r}, which seems to say whether the answer is a good one (as rows for KTO "
            "do), and every answer would be learnt as a good one; expected rows with good answers "
            "only: keep those in the file"
        )
    # `correct` may also be the number of the right choice.
    is_zero = plain != "correct" and text in ("0", "0.0")
    if plain in _VERDICTS and (is_zero or text in ("false", "no")):
        return (
            f"is {value!r}, so the answer seems to be a bad one, and would be learnt like the "
            "others; expected rows with good answers only: take such rows out of the file"
        )
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_share = is_number and (0 <= value < 1 or plain in _WEIGHTS - {"weight", "weights"})
    if plain in _WEIGHTS and is_share and value != 1:
        return (
            f"is {value!r}, and rows have no weights of their own here; expected weights of whole "
            "sources (weight, in dataset.path): put rows of another weight into another file"
        )
    if plain in _SWITCHES and text in ("false", "0"):
        return (
            f"is {value!r}, so the row is marked as not to be learnt: take such rows out of the "
            "file"
        )
    is_excluded = plain in _EXCLUDED and text in ("true", "1", "yes")
    if is_excluded or (plain in _STATES and text in _EXCLUDED_STATES):
        return (
            f"is {value!r}, so the row seems not to be meant for training; expected rows to learn "
            "alone: take such rows out of the file"
        )
    return None
