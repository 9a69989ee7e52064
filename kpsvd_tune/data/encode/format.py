"""Decide which form the rows have, and turn each row into a prompt and completion or a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kpsvd_tune.data.encode.messages import REASONING_KEYS, read_message, read_part
from kpsvd_tune.data.encode.tools import function_of, read_tools
from kpsvd_tune.data.read.columns import (
    absent_column,
    check_preference,
    column,
    is_blank,
    is_empty,
    looks_like_pair,
    message_kind,
    missing_column,
    naming,
    read_list,
    text_of,
)
from kpsvd_tune.data.read.files import Row, parsed
from kpsvd_tune.errors import DataError

# The roles whose column must be there; input, history and system may be absent.
REQUIRED_ROLES: Mapping[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL_ROLES: Mapping[str, tuple[str, ...]] = {
    "chat": ("system",),
    "sharegpt": ("system",),
    "alpaca": ("input", "system", "history"),
    "prompt-completion": ("system",),
    "text": (),
}
# Rows that are looked at to find the form, as the first ones may be empty or half empty.
_LOOKED_AT = 50
_NAMED = "named in the recipe"
# Columns of rows that hold one message each, as exports of chats have them.
_SPEAKERS = ("role", "from", "speaker", "author")
_SPOKEN = ("user", "human", "prompter", "assistant", "gpt", "bot", "system")
_SAID = ("content", "value", "text", "message")


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion to learn; only chat templates write its history and tools."""

    prompt: str
    completion: str
    system: str | None = None
    is_plain: bool = False  # whether the completion is plain text without a template
    history: tuple[tuple[str, str], ...] = ()  # earlier rounds of a question and its answer
    tools: tuple[Any, ...] | None = None  # what the assistant may call

    def as_chat(self) -> Chat:
        """The pair as messages, its completion the last of them."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in (*self.history, (self.prompt, self.completion)):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return Chat(tuple(messages), self.tools)


@dataclass(frozen=True)
class Chat:
    """Messages as the tokenizer's chat template takes them; turns that say something are learnt."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None = None  # what the assistant may call
    # Places of assistant turns that are not learnt all the same: those of a prompt, and those that
    # the row itself switches off.
    context: frozenset[int] = frozenset()
    notes: tuple[str, ...] = field(default=(), compare=False)  # what a user should know

    @property
    def learnt(self) -> tuple[int, ...]:
        """Places of the turns to learn, in their order."""
        return tuple(
            place
            for place, message in enumerate(self.messages)
            if place not in self.context and is_answer(message)
        )

    @property
    def last_called(self) -> str | None:
        """The tool that the last turn to learn calls; None where it calls none."""
        calls = self.messages[self.learnt[-1]].get("tool_calls") if self.learnt else None
        return str(function_of(calls[0]).get("name")) if calls else None


@dataclass(frozen=True)
class RowFormat:
    """The form of the rows, the column of each role, and why this form was taken."""

    name: str  # one of `REQUIRED_ROLES`
    columns: Mapping[str, str]
    reason: str
    has_messages: bool = False  # whether prompt and completion are lists of messages
    is_named: bool = False  # whether the recipe names the columns, rather than the rows

    @property
    def is_format_named(self) -> bool:
        """Whether the recipe names the form itself."""
        return self.reason == _NAMED

    @property
    def is_chat(self) -> bool:
        """Whether the rows hold messages rather than texts."""
        return self.name in ("chat", "sharegpt") or self.has_messages

    @property
    def is_pair(self) -> bool:
        """Whether the rows hold a prompt and a completion as texts, which a template writes."""
        return not self.is_chat and self.name != "text"

    def example(self, row: Row) -> Pair | Chat | None:
        """Read one row; None where it has nothing to learn: no completion, no assistant text."""
        # A csv line of commas, `{}`, or nulls throughout.
        if all(value is None or value == "" for value in row.values.values()):
            return None
        with row.told_in_errors():
            return self._chat(row) if self.is_chat else self._pair(row)

    def _pair(self, row: Row) -> Pair | None:
        self._check_single_answer(row)
        read = {role: self._text(row, role) for role in self.columns if role != "history"}
        answer = read[REQUIRED_ROLES[self.name][-1]]
        if is_blank(answer):
            return None
        if self.name == "text":
            return Pair("", answer, is_plain=True)
        asking = "instruction" if self.name == "alpaca" else "prompt"
        if asking in read and column(row, self.columns[asking]) is None:
            raise DataError(
                f"the column {self.columns[asking]!r} is null, so nothing asks for the "
                'answer; expected text: remove the row, or write "" where the prompt is meant to '
                "be empty"
            )
        prompt = read.get(asking, "")
        if self.name == "alpaca":
            prompt = "\n\n".join(text for text in (prompt, read.get("input", "")) if text)
        history = self._history(row) if "history" in self.columns else ()
        system = read.get("system") or None
        return Pair(prompt, answer, system, history=history, tools=read_tools(row))

    def _check_single_answer(self, row: Row) -> None:
        """Refuse several answers in a list, as data sets of questions hold all that count."""
        name = self.columns[REQUIRED_ROLES[self.name][-1]]
        value = column(row, name)
        is_several = isinstance(value, list) and len(value) > 1 and message_kind(value) is None
        if self.name != "text" and is_several and all(isinstance(each, str) for each in value):
            raise DataError(
                f"the column {name!r} holds a list of {len(value)} "
                f"({json.dumps(value, default=str)[:60]}), which would be learnt as one answer; "
                "expected one text: keep one of them, or join them where they are its lines"
            )

    def _system(self, row: Row) -> str:
        """The system prompt beside a chat: text, or parts of text as messages may hold them."""
        name = self.columns["system"]
        value = column(row, name)
        if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            return "".join(read_part(name, part, "text") for part in value)
        return self._text(row, "system")

    def _text(self, row: Row, role: str) -> str:
        name = self.columns[role]
        if role in _OPTIONAL_ROLES[self.name] and name.split(".")[0] not in row.values:
            return ""
        if role not in ("prompt", "instruction") and column(row, name) == []:
            return ""  # no context, or no answer, where other rows have a list of texts
        return text_of(row, name)

    def _history(self, row: Row) -> tuple[tuple[str, str], ...]:
        """Earlier rounds as LLaMA-Factory holds them: pairs of a question and its answer."""
        name = self.columns["history"]
        value = parsed(column(row, name))
        rounds = value or []
        if not isinstance(rounds, list) or not all(
            isinstance(each, list) and len(each) == 2 and all(isinstance(t, str) for t in each)
            for each in rounds
        ):
            raise DataError(
                f"the column {name!r} holds {json.dumps(value, default=str)[:60]}; "
                "expected the earlier rounds of the chat, [[question, answer], ...]: correct it, "
                f"or leave it out with dataset.ignore_columns: [{name}]"
            )
        return tuple((question, answer) for question, answer in rounds)

    def _chat(self, row: Row) -> Chat | None:
        tools = read_tools(row)
        messages: list[dict[str, Any]] = []
        context: set[int] = set()
        notes: list[str] = []
        for role in REQUIRED_ROLES[self.name]:
            name = self.columns[role]
            entries = _as_list(row, name, may_be_single=self.has_messages)
            kind = (message_kind(entries) or "chat") if self.has_messages else self.name
            for entry in entries:
                message, is_learnt, more = read_message(name, entry, kind, tools)
                if role == "prompt" or not is_learnt:
                    context.add(len(messages))
                messages.append(message)
                notes += [f"{about} (first: {row.where}{rest}" for about, rest in more]
                if only_thinks(message):
                    notes.append(
                        "assistant messages that hold reasoning alone, without text or call, are "
                        f"not learnt (first: {row.where}): join each with the answer behind it"
                    )
        if "system" in self.columns and (system := self._system(row)):
            if any(message["role"] == "system" for message in messages):
                raise DataError(
                    f"both {name!r} and the column {self.columns['system']!r} give a "
                    "system message; expected one of them: remove the other"
                )
            messages.insert(0, {"role": "system", "content": system})
            context = {place + 1 for place in context}
        answers = {place for place, message in enumerate(messages) if is_answer(message)}
        if not messages:
            self._refuse_another_form(row)
        if not answers - context:
            return None
        if messages[0]["role"] == "assistant" and 0 not in context:
            raise DataError(
                "the chat starts with the assistant; expected a system or user "
                "message first, since nothing asks for that answer: remove it or add the question"
            )
        return Chat(tuple(messages), tools, frozenset(context & answers), tuple(notes))

    def _refuse_another_form(self, row: Row) -> None:
        """Refuse a row without messages that holds an answer elsewhere, rather than drop it."""
        for form in ("prompt-completion", "alpaca"):
            name = REQUIRED_ROLES[form][-1]
            if name not in self.columns.values() and not is_empty(row.values.get(name)):
                raise DataError(
                    f"the row has no messages, as others have, but an answer in the "
                    f"column {name!r}; expected rows of one form: make a file of each form, or "
                    f"leave it out with dataset.ignore_columns: [{name}]"
                )


def find_format(
    rows: Sequence[Row],
    name: str,
    columns: Mapping[str, str],
    *,
    needs_prompt: bool = True,
    setting: str = "dataset.columns",
) -> RowFormat:
    """Take the named form, or detect it: from the recipe's columns, then from the rows' own.

    The first row that shows a form decides. `columns` gives the column of each role whose name
    differs from the role's; `setting` is where a user writes them, for messages.
    """
    filled = [row for row in rows[:_LOOKED_AT] if any(row.values.values())] or [rows[0]]
    first, reason, named = filled[0], _NAMED, columns
    if name == "auto":
        for row in filled:
            with row.told_in_errors():
                found = _detect(row, columns, needs_prompt, setting)
            if found:
                first, (name, columns, reason) = row, found
                break
        else:
            pair = REQUIRED_ROLES["prompt-completion"]
            missing = next((role for role in pair if role not in first.values), "prompt")
            raise missing_column(first, "prompt-completion", missing, missing, pair, setting)
    known = REQUIRED_ROLES[name] + _OPTIONAL_ROLES[name]
    if unknown := [role for role in columns if role not in known]:
        raise DataError(
            f"{setting} names the role {unknown[0]!r}; the format {name} has the roles "
            f"{', '.join(known)}"
        )
    _check_distinct(columns, setting)
    resolved = {}
    for role in known:
        source = columns.get(role, role)
        if column(first, source) is not None or source in first.values:
            # A column called "system" may mean anything beside a prompt: only taken when named.
            if role in columns or role != "system" or name != "prompt-completion":
                resolved[role] = source
        elif role in columns or (
            role in REQUIRED_ROLES[name] and (role != "prompt" or needs_prompt)
        ):
            raise missing_column(
                *(first, name, role, source, REQUIRED_ROLES[name], setting),
                names_format=reason == _NAMED,
            )
        elif role not in REQUIRED_ROLES[name] and name != "prompt-completion":
            resolved[role] = source  # later rows may have it
    has_messages = name == "prompt-completion" and _holds_messages(filled, resolved, setting)
    if has_messages:
        resolved.setdefault("system", "system")  # unmistakable beside messages
    is_named = any(role in named for role in REQUIRED_ROLES[name])
    return RowFormat(name, resolved, reason, has_messages, is_named)


def _check_distinct(columns: Mapping[str, str], setting: str) -> None:
    """Refuse one column for two roles, which would train the model to repeat the question."""
    roles: dict[str, str] = {}
    for role, name in columns.items():
        if (other := roles.setdefault(name, role)) != role:
            raise DataError(
                f"{setting} names the column {name!r} for {other} and for {role}; expected a "
                "column of its own for each role: correct one of the two"
            )


def _holds_messages(rows: Sequence[Row], columns: Mapping[str, str], setting: str) -> bool:
    """Whether prompt and completion are messages; refuses one that is and one that is text."""
    for row in rows:
        values = {role: column(row, name) for role, name in columns.items() if role != "system"}
        kinds = {role: message_kind(value, may_be_single=True) for role, value in values.items()}
        if not all(values.values()):
            continue
        if not all(kinds.values()):  # then a JSON object in a text is the text that was asked for
            for role, value in values.items():
                if isinstance(value, str) and value.lstrip().startswith("{"):
                    kinds[role] = None
        if any(kinds.values()) and (not all(kinds.values()) or len(kinds) == 1):
            role = next(role for role, kind in kinds.items() if kind)
            other = "completion" if role == "prompt" else "prompt"
            raise DataError(
                f"{row.where}: the column {columns[role]!r} holds messages, and "
                + (f"{columns[other]!r} holds text" if other in kinds else f"no column is {other}")
                + f"; expected text in both {role} and {other}, or lists of messages in both, such "
                "as [{'role': 'user', 'content': ...}]: rewrite one of them, or name others with "
                + naming(setting, {"prompt": "COLUMN", "completion": "COLUMN"})
            )
        return any(kinds.values())
    return False


def _detect(
    row: Row, columns: Mapping[str, str], needs_prompt: bool, setting: str
) -> tuple[str, Mapping[str, str], str] | None:
    for name, roles in REQUIRED_ROLES.items():
        if named := [role for role in roles if role in columns]:
            return name, columns, f"{setting} names {' and '.join(named)}"
    check_preference(row, setting)
    # A list of messages is unmistakable, whatever its column is called.
    kinds = {key: kind for key, value in row.values.items() if (kind := message_kind(value))}
    pair = REQUIRED_ROLES["prompt-completion"]
    is_pair = all(row.values.get(role) is not None for role in pair)
    if len(kinds) > 1 and not (is_pair and set(kinds) == set(pair)):
        raise several_messages(row, list(kinds), setting)
    for key, kind in kinds.items():
        if key in pair:
            break  # half of a pair, whose other half may be named otherwise
        keys = "role and content" if kind == "chat" else "from and value"
        role = REQUIRED_ROLES[kind][0]
        return kind, {**columns, role: key}, f"the column {key!r} holds messages with {keys}"
    for name in ("alpaca", "prompt-completion"):
        roles = REQUIRED_ROLES[name]
        if name == "prompt-completion" and not needs_prompt:
            roles = ("completion",)
        if all(role in row.values for role in roles):
            return name, columns, f"the rows have the columns {' and '.join(roles)}"
    _refuse_single_messages(row)
    # A text beside its summary or its label is half of a pair: which one must be said.
    if "text" in row.values and not looks_like_pair(row, "text"):
        return "text", columns, "the rows have the column text, and none for an answer"
    return None


def _refuse_single_messages(row: Row) -> None:
    """Refuse rows that are one message of a chat each, whose questions would be learnt as text."""
    speaker = next((name for name in _SPEAKERS if row.values.get(name) in _SPOKEN), None)
    text = next((name for name in _SAID if isinstance(row.values.get(name), str)), None)
    if speaker is None or text is None:
        return
    raise DataError(
        f"the columns {speaker!r} ({row.values[speaker]!r}) and {text!r} are those of "
        "one message of a chat; expected a whole chat in each row: join the messages of a chat to "
        "a list, messages: [{'role': ..., 'content': ...}], or learn every row as plain text with "
        f"dataset.format=text {naming('dataset.columns', {'text': text})}"
    )


def several_messages(row: Row, names: Sequence[str], setting: str) -> DataError:
    """The error for rows in which more than one column holds messages."""
    pair = REQUIRED_ROLES["prompt-completion"]
    usual = [
        name for role in ("chat", "sharegpt") for name in names if name in REQUIRED_ROLES[role]
    ]
    kept = pair if set(pair) <= set(names) else (usual or names)[:1]
    if kept == pair:
        columns = {role: role for role in pair}
    else:
        kind = message_kind(row.values[kept[0]]) or "chat"
        columns = {REQUIRED_ROLES[kind][0]: kept[0]}
    others = ", ".join(name for name in names if name not in kept)
    return DataError(
        f"the columns {', '.join(map(repr, names))} all hold messages; expected one "
        f"such column, since only one can be learnt: name it, as with {naming(setting, columns)}, "
        f"or leave the others out with dataset.ignore_columns: [{others}]"
    )


def _as_list(row: Row, name: str, may_be_single: bool) -> list[Any]:
    try:
        value = read_list(column(row, name))
    except ValueError as error:
        raise DataError(f"the column {name!r} {error}") from error
    if value is None and name not in row.values:
        raise absent_column(row, name)
    if value is None:
        return []
    if may_be_single and isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list):
        raise DataError(
            f"the column {name!r} holds {json.dumps(value, default=str)[:60]}; expected a list of "
            "messages"
        )
    return value


def is_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's and says something.

    Learning a turn that says nothing would teach the model to stop before its first word.
    """
    says_something = not is_blank(message["content"]) or message.get("tool_calls")
    return message["role"] == "assistant" and bool(says_something)


def only_thinks(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's and holds reasoning, and nothing else."""
    thinks = any(not is_empty(message.get(key)) for key in REASONING_KEYS)
    return message["role"] == "assistant" and thinks and not is_answer(message)
