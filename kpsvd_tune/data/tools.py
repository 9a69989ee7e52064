"""Tools and tool calls of chats, in the one form that chat templates expect: values, not JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpsvd_tune.data.files import Row, parse_json
from kpsvd_tune.errors import DataError


def read_tools(row: Row) -> tuple[Any, ...] | None:
    """The tools that the assistant of a row may call; a list, or the JSON text of one.

    Raises:
        DataError: The column `tools` holds something else.
    """
    value = row.values.get("tools")
    if isinstance(value, str):  # ShareGPT files and csv hold them so
        if not value.strip():
            return None
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(
                f"{row.where}: the column 'tools' is text and not JSON ({error}); expected a "
                "list of tools: correct it, or remove the column"
            ) from error
    if value is None:
        return None
    if not isinstance(value, list):
        raise DataError(
            f"{row.where}: the column 'tools' holds {type(value).__name__} ({str(value)[:40]}); "
            "expected a list of tools: write [...] around it, or remove the column"
        )
    return tuple(value) or None


def with_parsed_arguments(calls: Any) -> Any:
    """Tool calls whose arguments are objects.

    OpenAI writes arguments as JSON text. Templates write them with `tojson`, which puts such a
    text into quotes a second time, and the model would learn those quotes.
    """
    if not isinstance(calls, list):
        return calls
    return [_with_parsed(call) for call in calls]


def _with_parsed(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_parsed(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = parse_json(arguments)
    except ValueError:
        return call
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
