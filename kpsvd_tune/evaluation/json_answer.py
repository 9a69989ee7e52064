"""Answers that are JSON: whether they parse, follow a schema, and hold the right values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unicodedata import normalize

from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.completions import Completion
from kpsvd_tune.storage.paths import expand

INSTALL = (
    "the JSON schema cannot be checked without the package jsonschema; install it with: "
    "pip install 'kpsvd-tune[json]'"
)
_FENCED = re.compile(r"\s*```[^\n`]*\n(.*?)\n?```\s*", re.DOTALL)
_NOTHING = object()


@dataclass(frozen=True)
class Right:
    """The right answer of a row."""

    value: Any
    schema: Any = None  # that every answer has to follow; None: there is none


def parse_answer(text: str) -> tuple[bool, Any]:
    """Whether an answer is JSON, alone or in one code fence, and its value.

    An object with one key twice is none: which of the two values counts is unclear.
    """
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(
            fenced[1] if fenced else text,
            parse_constant=_refuse,
            object_pairs_hook=_without_repeats,
        )
        return True, value
    except (ValueError, RecursionError):
        return False, None


def right_answer(completion: Completion) -> Right:
    """The right answer of a completion."""
    gold = completion.gold
    if not isinstance(gold, Mapping) or "json" not in gold:
        raise DataError(
            f"the gold of the completion with id {completion.id!r} is {str(gold)[:60]!r}. Expected "
            '{"json": ...}; was this file written for another task?'
        )
    return Right(gold["json"], gold.get("schema"))


def gold_of(answer: str, schema: Any, where: str) -> dict[str, Any]:
    """The right answer of a row as completions keep it, checked.

    Raises:
        DataError: It is no JSON, or does not follow the schema.
    """
    is_json, value = parse_answer(answer)
    if not is_json:
        raise DataError(
            f"{where}: the right answer {answer[:60]!r} is no JSON, or gives a key twice, so "
            "that every answer would count as wrong; correct it, or take another task, such as "
            "exact_match"
        )
    if schema is None:
        return {"json": value}
    if (fault := schema_fault(value, schema)) is not None:
        raise DataError(
            f"{where}: the right answer does not follow evaluation.json_schema ({fault}); correct "
            "one of the two"
        )
    return {"json": value, "schema": schema}


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal as JSON: 1 is 1.0, and true is not 1."""
    return _canonical(one) == _canonical(other)


def shared_fields(value: Any, right: Any) -> float:
    """The share of equal fields, of all that one of the two has; a field is a value at a path."""
    ours, theirs = dict(_fields(_plain(value), ())), dict(_fields(_plain(right), ()))
    names = ours.keys() | theirs.keys()
    hits = sum(
        ours.get(name, _NOTHING) == theirs.get(name, _NOTHING) for name in names
    )  # fields are canonical texts
    return hits / len(names)


def read_schema(path: str) -> Any:
    """Read a JSON schema.

    Raises:
        InputError: The file is no JSON schema, or jsonschema is not installed.
    """
    if find_spec("jsonschema") is None:
        raise InputError(INSTALL)
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    file = Path(expand(path))
    try:
        schema = json.loads(file.read_bytes())
        validator_for(schema).check_schema(schema)
    except OSError as error:
        raise InputError(f"evaluation.json_schema: {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"evaluation.json_schema: {path} is no JSON ({error}); expected a JSON schema"
        ) from error
    except SchemaError as error:
        raise InputError(
            f"evaluation.json_schema: {path} is no JSON schema: {error.message}"
        ) from error
    return schema


def schema_fault(value: Any, schema: Any) -> str | None:
    """How a value breaks a schema, in words; None where it follows it.

    InputError: jsonschema is not installed, or the schema refers to another file.
    """
    if find_spec("jsonschema") is None:
        raise InputError(INSTALL)
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # A registry of its own: without one a reference would be fetched from the network.
    validator = validator_for(schema)(schema, registry=Registry())
    try:
        fault = next(validator.iter_errors(value), None)
    except Unresolvable as error:
        raise InputError(
            f"evaluation.json_schema refers to another schema ({error}); expected one file: put "
            "what it refers to under $defs"
        ) from error
    if fault is None:
        return None
    place = "/".join(map(str, fault.absolute_path))
    return f"{place}: {fault.message[:120]}" if place else str(fault.message[:120])


def _fields(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _fields(inner, (*path, key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _fields(inner, (*path, index))
    else:
        yield path, _canonical(value)


def _canonical(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {normalize("NFC", key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return normalize("NFC", value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
