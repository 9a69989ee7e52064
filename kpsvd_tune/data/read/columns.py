"""Look up columns in rows, and say what to write when one is missing."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from kpsvd_tune.data.read.files import Row, parse_json
from kpsvd_tune.errors import DataError, closest

# Names that real data sets use for a role, the clearest first.
_USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": (
        "prompt", "question", "instruction", "problem", "query", "input", "request", "user",
        "source", "context", "text",
    ),
    "completion": (
        "completion", "answer", "response", "output", "solution", "target", "reply", "assistant",
        "chosen", "answerkey",
        "code", "label", "summary", "text",
    ),
    "instruction": ("instruction", "question", "prompt", "problem", "task"),
    "output": ("output", "answer", "response", "completion", "solution"),
    "messages": ("messages", "conversation", "conversations", "chat", "dialog", "dialogue"),
    "conversations": ("conversations", "conversation", "messages", "chat", "dialog"),
    "text": ("text", "content", "body", "document", "passage", "completion"),
}  # fmt: skip


# Columns that belong before the answer besides the question, by plain names.
CONTEXT_NAMES = {
    *("input", "context", "history", "passage", "paragraph", "document", "documents", "article"),
    *("background", "knowledge", "evidence", "schema", "testlist", "choices", "options"),
}
# Unicode's categories of control and format characters, and of spaces.
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
# Characters of other categories that show nothing either: fillers, joiners, variation selectors,
# and the Braille pattern without dots.
_FILLERS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)
# Texts that are no content of an example.
_IDENTIFIERS = re.compile(r"(^|[._-])(id|uid|uuid|idx|index|url|uri|role|lang)$", re.IGNORECASE)
SYSTEM_NAMES = {"system", "systemprompt", "systemmessage"}


def column(row: Row, name: str) -> Any:
    """The value of a column, or None; "a.b" reaches into the object in column "a"."""
    if name in row.values:
        return row.values[name]
    value: Any = row.values
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def message_kind(value: Any, *, may_be_single: bool = False) -> str | None:
    """Whether a value is a list of messages, or the JSON text of one: "chat", "sharegpt" or None.

    With `may_be_single` one message that stands without a list counts too.
    """
    if isinstance(value, str):
        if _is_python_list(value):
            return "chat" if "'role'" in value else "sharegpt"
        if not value.lstrip().startswith(("[", "{")):
            return None
        try:
            value = parse_json(value)
        except ValueError:
            return None
    try:
        value = read_list(value)
    except ValueError:
        return "chat" if "role" in value else "sharegpt"
    messages = [value] if may_be_single and isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], Mapping):
        return None
    for kind, speaker, text in (("chat", "role", "content"), ("sharegpt", "from", "value")):
        # A message with a call alone, or a faulty one, has no text.
        if speaker in messages[0] and any(isinstance(m, Mapping) and text in m for m in messages):
            return kind
    return None


def read_list(value: Any) -> Any:
    """Messages as a list, which may stand as JSON text or as one object of lists; else as it is.

    Raises ValueError, in words that follow the column's name, where they cannot be read.
    """
    if isinstance(value, str):  # csv has no lists
        try:
            value = parse_json(value)
        except ValueError as error:
            cure = ": it is a list as Python prints it, so write the column with json.dumps"
            raise ValueError(
                f"is text and not a JSON list of messages ({error}); expected [{{...}}, ...]"
                f"{cure if _is_python_list(value) else ''}"
            ) from error
    if not isinstance(value, Mapping):
        return value
    # Arrow holds messages as one object of lists.
    lists = {key: each for key, each in value.items() if isinstance(each, list)}
    is_struct = {"role", "content"} <= set(lists) or {"from", "value"} <= set(lists)
    if not is_struct or any(each is not None for key, each in value.items() if key not in lists):
        return value
    if len({len(each) for each in lists.values()}) > 1:
        lengths = ", ".join(f"{key}: {len(each)}" for key, each in lists.items())
        raise ValueError(
            f"holds one object of lists and its lists have different lengths ({lengths}); expected "
            "a role and a text for each message: mend the row"
        )
    return [dict(zip(lists, entries, strict=True)) for entries in zip(*lists.values(), strict=True)]


def ends_with_question(value: Any) -> bool:
    """Whether the last message of a chat is the user's; False where it cannot be told."""
    try:
        value = read_list(value)
    except ValueError:
        return False
    if not isinstance(value, list) or not value or not isinstance(value[-1], Mapping):
        return False
    return _speaker(value[-1]) in ("user", "human")


def _is_python_list(text: str) -> bool:
    """Whether a text is a list of messages as Python prints it, which pandas writes into csv."""
    return re.match(r"\s*\[\s*\{\s*'", text) is not None and (
        ("'role'" in text and "'content'" in text) or ("'from'" in text and "'value'" in text)
    )


def text_of(row: Row, name: str) -> str:
    """The text of a column: null is empty, a whole number is written out, texts are lines."""
    value = column(row, name)
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        value = "\n".join(value)  # a list of texts holds lines, such as the tests of a task
    if isinstance(value, str):
        check_characters(name, value)
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        if name.split(".")[0] not in row.values:
            raise absent_column(row, name)
        return ""
    if isinstance(value, Mapping):
        inner = next(iter(value), "key")
        cure = f"; to reach into it write the column as {name}.{inner}"
    elif isinstance(value, list):
        cure = (
            "; for chat messages set dataset.format to chat or sharegpt"
            if value
            else "; a list of messages needs at least one: remove the row, or write the question"
        )
    else:
        cure = "; write it as text, so that exactly these characters are learnt"
    raise DataError(f"the column {name!r} holds {_kind(value)}; expected text{cure}")


def check_characters(name: str, text: str) -> None:
    """Refuse half a surrogate pair, which JSON can hold and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the column {name!r} has half a surrogate pair ({text[error.start]!r}), which is no "
            "character; remove it or write the whole character"
        ) from error


def absent_column(row: Row, name: str) -> DataError:
    """The error for a row that lacks a column of the other rows, with the key that it may be."""
    near = next((key for key, value in row.values.items() if message_kind(value)), None)
    if name in _USUAL_NAMES and name not in ("messages", "conversations"):
        near = nearest(name, list(row.values))
    cure = f"rename {near!r} to {name!r}" if near else f"write a {name!r} into it"
    return DataError(
        f"has no column {name!r}, which other rows have; found "
        f"{describe_columns(row)}; expected rows of one form: {cure}, remove the row or put it "
        "into a file of its own, or have such rows left out with dataset.on_bad_row=drop"
    )


def naming(setting: str, columns: Mapping[str, str]) -> str:
    """The words that name columns by role, as one types them: a shell would split braces."""
    if setting.startswith("--"):
        return shlex.join([setting, ",".join(f"{role}={name}" for role, name in columns.items())])
    listed = ", ".join(f"{role}: {name}" for role, name in columns.items())
    return shlex.quote(f"{setting}={{{listed}}}")


def missing_column(
    row: Row,
    form: str,
    role: str,
    name: str,
    required: Sequence[str],
    setting: str,
    names_format: bool = False,
) -> DataError:
    """The error for a column that a role of the form needs, with what to write to use another.

    `setting` is where users name columns; with `names_format` another form must be named too.
    """
    advised, mapping, is_guess = _advice(row, form, required)
    what = f"the column {name!r}" + (f" for {role}" if name != role else "")
    lead = "for example " if is_guess else "the nearest is "
    if "COLUMN" in mapping.values():
        lead = "say which columns to use: "
    changes = f"dataset.format={advised} " if names_format and advised != form else ""
    return DataError(
        f"{row.where}: {what} is missing; found {describe_columns(row)}; expected "
        f"{' and '.join(required)} (format {form}); {lead}{changes}{naming(setting, mapping)}"
    )


def advised_columns(row: Row) -> tuple[dict[str, str], bool] | None:
    """Columns by role for rows whose own names show no form; None where some role has none.

    Gives with them whether they are guessed by their order alone.

    Raises:
        DataError: The row holds a preferred and a rejected answer.
    """
    check_preference(row, "dataset.columns")
    _, mapping, is_guess = _advice(row, "prompt-completion", ("prompt", "completion"))
    return None if "COLUMN" in mapping.values() else (mapping, is_guess)


def _advice(row: Row, form: str, required: Sequence[str]) -> tuple[str, dict[str, str], bool]:
    """The form and columns by role that use all of the row; whether some are guessed by order."""
    paths = _text_paths(row)
    for path in paths:
        kind = message_kind(column(row, path))
        if kind is not None and path not in ("prompt", "completion"):
            return kind, {"messages" if kind == "chat" else "conversations": path}, False
    if form in ("chat", "sharegpt"):
        # No column holds messages, whatever one of them is called.
        other = _advice(row, "prompt-completion", ("prompt", "completion"))
        is_whole = "COLUMN" not in other[1].values()
        return other if is_whole else (form, dict.fromkeys(required, "COLUMN"), False)
    found: dict[str, str] = {}
    for wanted in required:
        free = [path for path in paths if path not in found.values()]
        if close := nearest(wanted, free):
            found[wanted] = close
    free = [path for path in paths if path not in found.values() and _is_text(row, path)]
    left = [role for role in required if role not in found]
    texts = [path for path in free if not _IDENTIFIERS.search(path)]
    if left and len(left) == len(texts):
        # A text beside its summary or translation: only the order can tell which is which.
        found |= dict(zip(left, texts, strict=True))
        return form, {role: found[role] for role in required}, True
    if form not in ("prompt-completion", "alpaca") or left:
        return form, {role: found.get(role, "COLUMN") for role in required}, False
    more = {
        role: path
        for role, names in (("input", CONTEXT_NAMES), ("system", SYSTEM_NAMES))
        for path in reversed(free)  # the first of several counts
        if plain_name(path.split(".")[-1]) in names
    }
    if "input" in more:
        asking, answer = found.values()
        return "alpaca", {"instruction": asking, "output": answer, **more}, False
    return form, {**found, **more}, False


def _is_text(row: Row, path: str) -> bool:
    value = column(row, path)
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, str) for each in value)
    return isinstance(value, str) and bool(value.strip())


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: spaces, control characters and characters without width."""
    return all(unicodedata.category(each) in _INVISIBLE or _FILLERS.match(each) for each in text)


def is_empty(value: Any) -> bool:
    """Whether a column or key holds nothing: null, no text, an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | dict) and not value)


def plain_name(name: str) -> str:
    """A name without case, "_" and "-", as names are compared."""
    return name.lower().replace("_", "").replace("-", "")


def looks_like_pair(row: Row, name: str) -> bool:
    """Whether another column than `name` is called as prompts or completions are."""
    others = [path for path in _text_paths(row) if path != name]
    return any(nearest(role, others) is not None for role in ("prompt", "completion"))


def describe_columns(row: Row) -> str:
    """The names of a row's columns, as an error message lists them."""
    return f"the columns {', '.join(map(str, row.values))}" if row.values else "no columns"


def nearest(role: str, names: Sequence[str]) -> str | None:
    """The name that is most like those that real data sets use for a role; None: none is."""
    lowered = {name.split(".")[-1].lower(): name for name in reversed(names)}
    for usual in _USUAL_NAMES[role]:
        if usual in lowered:
            return lowered[usual]
    for usual in _USUAL_NAMES[role]:
        if close := closest(usual, lowered, 0.75):
            return lowered[close]
    return None


def _text_paths(row: Row) -> list[str]:
    """Columns and, one level down, the keys of nested objects."""
    paths: list[str] = []
    for name, value in row.values.items():
        if isinstance(value, Mapping):
            paths += [f"{name}.{key}" for key in value]
        elif not (isinstance(value, list) and value and isinstance(value[0], int)):
            paths.append(name)  # lists of numbers are ids of rows that were tokenised elsewhere
    return paths


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", float: "a decimal number"}
    return f"{names.get(type(value), type(value).__name__)} ({str(value)[:40]})"


_REJECTED = re.compile(r"(.*[_-])?rejected([_-].*)?", re.IGNORECASE)
_CHOSEN = re.compile(r"(.*[_-])?chosen([_-].*)?", re.IGNORECASE)


def check_preference(row: Row, setting: str) -> None:
    """Refuse a row that holds a preferred and a rejected answer: only one is to be learnt."""
    rejected, chosen = _answer(row, _REJECTED), _answer(row, _CHOSEN)
    if rejected is None:
        return
    names = f"{chosen!r} and {rejected!r}" if chosen else repr(rejected)
    raise DataError(
        f"{'columns' if chosen else 'the column'} {names}: these are rows of "
        "preferences, and this tool learns answers as they are (supervised fine-tuning); expected "
        f"one answer a row: {_cure(row, chosen, rejected, setting)}; to train on preferences: "
        "docs/hosts.md, Preferences"
    )


def _answer(row: Row, pattern: re.Pattern[str]) -> str | None:
    """The first column of such a name with an answer in it, rather than its score."""
    for name, value in row.values.items():
        if pattern.fullmatch(name) and value and isinstance(value, str | list | dict):
            return name
    return None


def _cure(row: Row, chosen: str | None, rejected: str, setting: str) -> str:
    if chosen is None:
        return f"leave the other out with dataset.ignore_columns: [{rejected}]"
    value: Any = row.values[chosen]
    kind = message_kind(value, may_be_single=True)
    asking = ("prompt", "messages", "conversations", "question", "instruction", "input")
    before = next((name for name in asking if row.values.get(name)), None)
    first = value[0] if isinstance(value, list) else value
    starts_with_answer = isinstance(first, dict) and _speaker(first) in ("assistant", "gpt")
    if kind is not None and not starts_with_answer:
        role = "messages" if kind == "chat" else "conversations"
        columns = {role: chosen}
    elif kind is not None and before is not None and message_kind(row.values[before]) is None:
        return (
            f"write {before!r} as [{{'role': 'user', 'content': ...}}], and then "
            f"{naming(setting, {'prompt': before, 'completion': chosen})} learns the preferred one"
        )
    elif before is not None:
        columns = {"prompt": before, "completion": chosen}
    else:
        columns = {"text": chosen}
    return f"to learn the preferred one, write {naming(setting, columns)}"


def _speaker(message: Mapping[str, Any]) -> Any:
    return message.get("role") or message.get("from")
