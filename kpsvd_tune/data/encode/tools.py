"""Tools and tool calls of chats, in the form that chat templates expect: values, not JSON text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from kpsvd_tune.data.read.files import Row, parse_json, parsed
from kpsvd_tune.errors import DataError

Rendered = TypeVar("Rendered", bound=tuple[str, Any])
# What a user should know: the text before the place of the row, and that behind it.
Note = tuple[str, str]
# "functions" is OpenAI's older name.
TOOL_COLUMNS = ("tools", "functions")


def function_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a tool or a call holds under "function", or itself, as they may be written too."""
    inner = entry.get("function")
    return inner if isinstance(inner, Mapping) else entry


def read_tools(row: Row) -> tuple[Any, ...] | None:
    """The tools that the assistant of a row may call; a list, or the JSON text of one."""
    found = {name: read for name in TOOL_COLUMNS if (read := _read_column(row, name))}
    if len(found) > 1:
        raise DataError(
            "both the columns 'tools' and 'functions' hold tools; expected one of "
            "them: leave one out with dataset.ignore_columns: [functions]"
        )
    if "functions" in found:
        return tuple(
            each if "function" in each else {"type": "function", "function": each}
            for each in found["functions"]
        )
    return found.get("tools")


def _read_column(row: Row, name: str) -> tuple[Any, ...] | None:
    value = row.values.get(name)
    if isinstance(value, str):  # ShareGPT files and csv hold them so
        if not value.strip():
            return None
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(
                f"the column {name!r} is text and not JSON ({error}); expected a "
                f"list of tools: correct it, or leave it out with dataset.ignore_columns: [{name}]"
            ) from error
    if value is None:
        return None
    if isinstance(value, list):  # Arrow holds tools of different keys as JSON texts
        value = [parsed(each) for each in value]
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise DataError(
            f"the column {name!r} holds {type(value).__name__} ({str(value)[:40]}); "
            "expected a list of tools, each an object: "
            + ("write [...] around it" if isinstance(value, Mapping) else "correct it")
            + f", or leave it out with dataset.ignore_columns: [{name}]"
        )
    return tuple(_without_nulls(value)) or None


def read_calls(
    name: str, message: dict[str, Any], tools: Sequence[Any] | None, notes: list[Note]
) -> list[Any]:
    """Take the calls of `tool_calls`, or of OpenAI's older `function_call`, out of a message.

    Arguments that are JSON text become objects, for `tojson` would quote such a text a second time.
    Nulls that the tool's schema does not allow are left out: Arrow fills each call with the
    arguments of all tools. `notes` gets what a user should know.
    """
    calls = parsed(message.pop("tool_calls", None) or [])
    legacy = message.pop("function_call", None)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(
            f"'tool_calls' of a message in {name!r} is {str(calls)[:60]!r}; expected "
            "a list of objects such as {'function': {'name': ..., 'arguments': {...}}}"
        )
    if legacy:
        if calls or not isinstance(legacy, Mapping) or not legacy.get("name"):
            what = "stands beside 'tool_calls'" if calls else f"is {str(legacy)[:60]!r}"
            raise DataError(
                f"'function_call' of a message in {name!r} {what}; expected "
                "{'name': ..., 'arguments': ...} and no 'tool_calls' in the same message: "
                "correct it, or remove the key"
            )
        calls = [{"type": "function", "function": legacy}]
    return [_read_call(call, tools, notes) for call in calls]


def _read_call(
    call: Mapping[str, Any], tools: Sequence[Any] | None, notes: list[Note]
) -> dict[str, Any]:
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _read_call(call["function"], tools, notes)}
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise DataError(
            f"a call of a tool has no name: {json.dumps(call, default=str)[:60]}; "
            "expected {'function': {'name': ..., 'arguments': {...}}}: correct it, or remove it"
        )
    # Some files write a call without arguments in this way; a template would write "" or nothing.
    is_without = isinstance(arguments, str) and arguments.strip() in ("", "null")
    if is_without or set(call) <= {"name", "id", "type", "index"}:
        return {**call, "arguments": {}}
    if isinstance(arguments, str):
        value = parsed(arguments)
        return {**call, "arguments": value} if isinstance(value, dict) else call
    if isinstance(arguments, Mapping):
        kept = _given(arguments, _schema(call.get("name"), tools))
        if kept != arguments:
            cure = (
                "files exported through Arrow hold them where a call gives none; to keep one, let "
                "the tool's schema allow null, or write the arguments as JSON text"
            )
            about = "null arguments of tool calls are left out"
            notes.append((about, f", {call.get('name')}): {cure}"))
        return {**call, "arguments": kept}
    return call


def _schema(name: Any, tools: Sequence[Any] | None) -> Any:
    for tool in tools or ():
        if function_of(tool).get("name") == name:
            return function_of(tool).get("parameters")
    return None


def _given(value: Any, schema: Any) -> Any:
    """A value without the nulls in its objects that the JSON schema does not allow."""
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, Mapping):
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        return {
            key: _given(inner, properties.get(key))
            for key, inner in value.items()
            if inner is not None or _allows_null(properties.get(key))
        }
    if isinstance(value, list):
        return [_given(inner, schema.get("items")) for inner in value]
    return value


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    choices = [
        each
        for key in ("anyOf", "oneOf")
        if isinstance(schema.get(key), list)
        for each in schema[key]
    ]
    values = schema.get("enum")
    return (
        "null" in kinds
        or schema.get("nullable") is True
        or (isinstance(values, list) and None in values)
        or any(map(_allows_null, choices))
    )


def _without_nulls(value: Any) -> Any:
    """The definition of a tool without the nulls that Arrow fills in; a lone default stays."""
    if isinstance(value, Mapping):
        nulls = [key for key, inner in value.items() if inner is None]
        if nulls == ["default"]:
            nulls = []
        return {key: _without_nulls(inner) for key, inner in value.items() if key not in nulls}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def render_calls(
    render: Callable[[list[dict[str, Any]]], Rendered], messages: list[dict[str, Any]]
) -> Rendered:
    """Render a chat with the arguments of calls as objects, or as text where a template needs it.

    Some templates join arguments with text: with objects they fail or write them as Python does.
    """
    objects = [
        arguments
        for message in messages
        for call in message.get("tool_calls") or ()
        if isinstance(arguments := function_of(call).get("arguments"), Mapping)
    ]
    if not objects:
        return render(messages)
    try:
        found = render(messages)
    except TypeError:
        return render(_with_text_arguments(messages))
    shown = [str(each) for each in objects if each and str(each) in found[0]]
    if not shown:
        return found
    other = render(_with_text_arguments(messages))
    # The same text may stand in a message, which is no reason to take the other rendering.
    is_other = all(other[0].count(each) < found[0].count(each) for each in shown)
    return other if is_other else found


def _with_text_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def written(call: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": written(call["function"])}
        if not isinstance(call.get("arguments"), Mapping):
            return call
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
