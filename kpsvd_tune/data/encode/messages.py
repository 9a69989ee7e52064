"""Read one message of a chat: who speaks, the text, the calls, and whether its turn is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpsvd_tune.data.encode.tools import Note, read_calls
from kpsvd_tune.data.read.columns import check_characters, is_empty
from kpsvd_tune.data.read.files import parsed
from kpsvd_tune.errors import DataError

# LLaMA-Factory's speaker of a turn that calls tools; its text is the call as JSON.
_CALL = "function_call"
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    _CALL: "assistant",
}
# "function" is OpenAI's older name of the role that gives a tool's result.
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "function": "tool",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Keys of other programs that say which turns are learnt; their meaning differs between them.
_FOREIGN_SWITCHES = (
    *("trainable", "training", "train_detail", "loss", "loss_weight", "loss_mask"),
    *("mask", "masked", "is_masked", "learn"),
)
# Keys by which APIs are asked to go on with an assistant's unfinished turn.
_UNFINISHED = ("prefix", "partial")


def read_message(
    name: str, entry: Any, kind: str, tools: tuple[Any, ...] | None
) -> tuple[dict[str, Any], bool, list[Note]]:
    """Read one entry of the messages in the column `name`, of the kind "chat" or "sharegpt".

    Gives the message as templates take it, whether its own switches let it be learnt, and notes.
    """
    speaker, text = ("role", "content") if kind == "chat" else ("from", "value")
    if not isinstance(entry, Mapping) or speaker not in entry:
        found = f"the keys {', '.join(entry)}" if isinstance(entry, Mapping) else repr(entry)
        other = {"chat": "sharegpt", "sharegpt": "chat"}[kind]
        raise DataError(
            f"a message in {name!r} has {found}; expected {{{speaker!r}: ..., "
            f"{text!r}: ...}}: check the row, or set dataset.format to {other}"
        )
    # Arrow fills keys that other messages have with null; a template would print "None".
    message = {key: value for key, value in entry.items() if value is not None}
    spoken = message.pop(speaker, None)
    roles = _ROLES if kind == "chat" else _SPEAKERS
    if spoken not in roles:
        raise DataError(
            f"unknown {speaker} {spoken!r} in {name!r}; expected one of "
            f"{', '.join(roles)}: rename it"
        )
    role = roles[spoken]
    content = _content(name, message.pop(text, None), role, spoken, text)
    if spoken == _CALL:
        if "tool_calls" in message:
            raise DataError(
                f"a message from {_CALL!r} in {name!r} has 'tool_calls' besides; "
                "expected the call in its text alone: remove the key"
            )
        message["tool_calls"], content = _called(name, content), ""
    _check_finished(name, message, role)
    is_learnt = _read_switches(name, message, role)
    notes: list[Note] = []
    if calls := read_calls(name, message, tools, notes):
        message["tool_calls"] = calls
    return {"role": role, "content": content, **message}, is_learnt, notes


def _content(name: str, content: Any, role: str, spoken: str, key: str) -> str:
    if content is None and role in ("assistant", "tool"):
        return ""  # beside a call, or from a tool that gives no answer
    if content is None:
        raise DataError(
            f"a message of {spoken!r} in {name!r} has no text ({key!r} is null or "
            'missing); expected text: remove the message, or write "" where it is meant to be empty'
        )
    if isinstance(content, list):
        content = "".join(read_part(name, part, key) for part in content)
    if not isinstance(content, str):
        raise DataError(
            f"{key!r} of a message in {name!r} is {type(content).__name__}; "
            "expected text, or a list of parts such as {'type': 'text', 'text': ...}"
        )
    check_characters(name, content)
    return content


def read_part(name: str, part: Any, key: str) -> str:
    """The text of one part, of a content that is a list of parts as OpenAI writes it."""
    if isinstance(part, str):
        return part
    given = part if isinstance(part, Mapping) else {}
    kind, text = given.get("type", "text"), given.get("text")
    media = [key for key in (*MEDIA_KEYS, "image_url") if not is_empty(given.get(key))]
    if kind in _TEXT_PARTS and isinstance(text, str) and not media:
        return text
    kind = media[0] if media else kind
    what = f"of the type {kind!r}" if kind not in _TEXT_PARTS else f"{part!r:.60}"
    raise DataError(
        f"{key!r} of a message in {name!r} has a part {what}; expected parts of text "
        "alone ({'type': 'text', 'text': ...}), since only texts are trained here: remove the "
        "part or the row"
    )


def _called(name: str, content: str) -> list[dict[str, Any]]:
    """The calls in the text of a turn from `function_call`: an object of name and arguments."""
    value = parsed(content)
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        is_call = isinstance(call, Mapping) and isinstance(call.get("name"), str)
        if not is_call or "arguments" not in call:
            raise DataError(
                f"a message from {_CALL!r} in {name!r} holds {content[:60]!r}; "
                'expected JSON such as {"name": "search", "arguments": {"query": "..."}}, or a '
                "list of these: correct it, or let it come from gpt if it is text"
            )
    return [{"type": "function", "function": dict(call)} for call in calls]


def _check_finished(name: str, message: dict[str, Any], role: str) -> None:
    """Refuse a turn that is marked as a beginning: it would be learnt with an end behind it."""
    for key in _UNFINISHED:
        if role == "assistant" and message.get(key) is True:
            raise DataError(
                f"a message in {name!r} has {key}: true, so it is the beginning of an "
                "answer, and would be learnt as a whole one that stops there; expected whole "
                "answers: join it with the message that goes on, or remove the key if it is whole"
            )
        if message.get(key) is False:
            del message[key]


def _read_switches(name: str, message: dict[str, Any], role: str) -> bool:
    """Take the keys out that say whether a turn is learnt; the template never sees them."""
    understood = (
        "expected weight: 0 or 1, or train: true or false, on assistant messages: a turn with 0 or "
        "false stays in the chat and is not learnt"
    )
    found: set[bool] = set()
    for key in ("weight", "train", *_FOREIGN_SWITCHES):
        if key not in message:
            continue
        value = message.pop(key)
        # True equals 1 in Python, but not in a data file.
        is_flag = isinstance(value, bool) == (key == "train") and value in (0, 1)
        if key in _FOREIGN_SWITCHES or not is_flag:
            raise DataError(
                f"a message in {name!r} has {key}: {value!r}, which is not "
                f"understood; {understood}: rewrite the key, or remove it"
            )
        found.add(bool(value))
    if len(found) == 2:
        raise DataError(
            f"weight and train of a message in {name!r} contradict each other; "
            f"{understood}: remove one of them"
        )
    if role != "assistant" and True in found:
        raise DataError(
            f"a message of the role {role!r} in {name!r} is marked to be learnt, and "
            f"only assistant messages are; {understood}: remove the key, or set it to 0 or false"
        )
    return False not in found
