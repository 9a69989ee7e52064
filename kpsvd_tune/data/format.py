"""Decide which form the rows have, and turn each row into a prompt and completion or a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpsvd_tune.data.columns import (
    check_characters,
    column,
    describe_columns,
    looks_like_pair,
    missing_column,
    text_of,
)
from kpsvd_tune.data.files import Row, parse_json
from kpsvd_tune.data.tools import read_tools, with_parsed_arguments
from kpsvd_tune.errors import DataError

# The roles whose column must be there; input and system may be absent.
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
    "alpaca": ("input", "system"),
    "prompt-completion": ("system",),
    "text": (),
}
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion to learn.

    Attributes:
        prompt: Text before it.
        completion: Text to learn.
        system: System prompt; None where no column gives it.
        is_plain: Whether the completion is plain text, which no template is put around.
    """

    prompt: str
    completion: str
    system: str | None = None
    is_plain: bool = False


@dataclass(frozen=True)
class Chat:
    """Messages as the tokenizer's chat template takes them; every assistant turn is learnt."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class RowFormat:
    """The form of the rows, the column of each role, and why this form was taken."""

    name: str
    columns: Mapping[str, str]
    reason: str

    @property
    def is_chat(self) -> bool:
        """Whether the rows hold messages rather than texts."""
        return self.name in ("chat", "sharegpt")

    def example(self, row: Row) -> Pair | Chat | None:
        """Read one row.

        Returns:
            The example, or None where there is nothing to learn: an empty row, an empty
            completion, no assistant text.

        Raises:
            DataError: A column is missing or holds something else than text or messages.
        """
        # A csv line of commas, `{}`, or nulls throughout.
        if all(value is None or value == "" for value in row.values.values()):
            return None
        if self.is_chat:
            return self._chat(row)
        return self._pair(row)

    def _pair(self, row: Row) -> Pair | None:
        read = {role: self._text(row, role) for role in self.columns}
        if self.name == "text":
            pair = Pair("", read["text"], is_plain=True)
        elif self.name == "alpaca":
            request = "\n\n".join(t for t in (read["instruction"], read.get("input", "")) if t)
            pair = Pair(request, read["output"], read.get("system") or None)
        else:
            pair = Pair(read.get("prompt", ""), read["completion"], read.get("system") or None)
        return pair if pair.completion.strip() else None

    def _text(self, row: Row, role: str) -> str:
        name = self.columns[role]
        if role in _OPTIONAL_ROLES[self.name] and name.split(".")[0] not in row.values:
            return ""
        return text_of(row, name)

    def _chat(self, row: Row) -> Chat | None:
        key = "messages" if self.name == "chat" else "conversations"
        name = self.columns[key]
        entries = _as_list(row, name)
        messages = [self._message(row, name, entry) for entry in entries]
        if "system" in self.columns and (system := self._text(row, "system")):
            if any(message["role"] == "system" for message in messages):
                raise DataError(
                    f"{row.where}: both {name!r} and the column {self.columns['system']!r} give a "
                    "system message; expected one of them: remove the other"
                )
            messages.insert(0, {"role": "system", "content": system})
        if not any(map(is_answer, messages)):
            return None
        if messages[0]["role"] == "assistant":
            raise DataError(
                f"{row.where}: the chat starts with the assistant; expected a system or user "
                "message first, since nothing asks for that answer: remove it or add the question"
            )
        return Chat(tuple(messages), read_tools(row))

    def _message(self, row: Row, name: str, entry: Any) -> dict[str, Any]:
        speaker, text = ("role", "content") if self.name == "chat" else ("from", "value")
        if not isinstance(entry, Mapping) or speaker not in entry:
            found = f"the keys {', '.join(entry)}" if isinstance(entry, Mapping) else repr(entry)
            other = {"chat": "sharegpt", "sharegpt": "chat"}[self.name]
            raise DataError(
                f"{row.where}: a message in {name!r} has {found}; expected {{{speaker!r}: ..., "
                f"{text!r}: ...}}: check the row, or set dataset.format to {other}"
            )
        # Arrow fills keys that other messages have with null; a template would print "None".
        message = {key: value for key, value in entry.items() if value is not None}
        role = message.pop(speaker, None)
        roles = dict.fromkeys(_CHAT_ROLES) if self.name == "chat" else _SPEAKERS
        if role not in roles:
            raise DataError(
                f"{row.where}: unknown {speaker} {role!r} in {name!r}; expected one of "
                f"{', '.join(roles)}: rename it"
            )
        content = message.pop(text, "")
        if not isinstance(content, str):
            raise DataError(
                f"{row.where}: {text!r} of a message in {name!r} is {type(content).__name__}; "
                "expected text"
            )
        check_characters(row, name, content)
        if "tool_calls" in message:
            message["tool_calls"] = with_parsed_arguments(message["tool_calls"])
        return {"role": _SPEAKERS.get(role, role), "content": content, **message}


def find_format(
    rows: Sequence[Row],
    name: str,
    columns: Mapping[str, str],
    *,
    needs_prompt: bool = True,
    setting: str = "dataset.columns",
) -> RowFormat:
    """Take the named form, or detect it: from the recipe's columns, then from the rows' own.

    Args:
        rows: At least one row; the first one that is not empty is looked at.
        name: "auto" or one of `REQUIRED_ROLES`.
        columns: Column of each role whose name differs from the role's; "a.b" reaches into an
            object.
        needs_prompt: Whether the template has a prompt in it.
        setting: Where a user writes `columns`, for messages.

    Raises:
        DataError: No form fits; the message lists what was found, what was expected and the
            nearest `columns` to write.
    """
    first = next((row for row in rows if any(row.values.values())), rows[0])
    if name == "auto":
        name, columns, reason = _detect(first, columns, needs_prompt, setting)
    else:
        reason = "named in the recipe"
    known = REQUIRED_ROLES[name] + _OPTIONAL_ROLES[name]
    if unknown := [role for role in columns if role not in known]:
        raise DataError(
            f"{setting} names the role {unknown[0]!r}; the format {name} has the roles "
            f"{', '.join(known)}"
        )
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
            raise missing_column(first, name, role, source, REQUIRED_ROLES[name], setting)
        elif role not in REQUIRED_ROLES[name] and name != "prompt-completion":
            resolved[role] = source  # later rows may have it
    return RowFormat(name, resolved, reason)


def _detect(
    row: Row, columns: Mapping[str, str], needs_prompt: bool, setting: str
) -> tuple[str, Mapping[str, str], str]:
    for name, roles in REQUIRED_ROLES.items():
        if named := [role for role in roles if role in columns]:
            return name, columns, f"{setting} names {' and '.join(named)}"
    # A list of messages is unmistakable, whatever its column is called.
    for key, value in row.values.items():
        if kind := _message_kind(value):
            role = REQUIRED_ROLES[kind][0]
            keys = "role and content" if kind == "chat" else "from and value"
            return kind, {**columns, role: key}, f"the column {key!r} holds messages with {keys}"
    for name in ("alpaca", "prompt-completion"):
        roles = REQUIRED_ROLES[name]
        if name == "prompt-completion" and not needs_prompt:
            roles = ("completion",)
        if all(role in row.values for role in roles):
            return name, columns, f"the rows have the columns {' and '.join(roles)}"
    # A text beside its summary or its label is half of a pair: which one must be said.
    if "text" in row.values and not looks_like_pair(row, "text"):
        return "text", columns, "the rows have the column text, and none for an answer"
    raise missing_column(
        row, "prompt-completion", "prompt", "prompt", ("prompt", "completion"), setting
    )


def _message_kind(value: Any) -> str | None:
    if isinstance(value, str) and value.startswith("[{"):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, Mapping):
        return None
    if {"role", "content"} <= set(first):
        return "chat"
    return "sharegpt" if {"from", "value"} <= set(first) else None


def _as_list(row: Row, name: str) -> list[Any]:
    value = column(row, name)
    if isinstance(value, str):  # csv has no lists: the messages stand there as JSON text
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(
                f"{row.where}: the column {name!r} is text and not a JSON list of messages "
                f"({error}); expected [{{...}}, ...]"
            ) from error
    if value is None and name not in row.values:
        raise DataError(f"{row.where}: has no column {name!r}; found {describe_columns(row)}")
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(
            f"{row.where}: the column {name!r} holds {json.dumps(value, default=str)[:60]}; "
            "expected a list of messages"
        )
    return value


def is_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's and says something.

    Learning a turn that says nothing would teach the model to stop before its first word.
    """
    says_something = message["content"].strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(says_something)
