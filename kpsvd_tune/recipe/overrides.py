"""Overrides from the command line: `key=value`, a dotted path and a YAML value."""

from __future__ import annotations

import re
from typing import Any

from kpsvd_tune.recipe.reading import MAX_BYTES, Document, Fault, Path, read_yaml

_INDEX = re.compile(r"\[(\d{1,9})\](?=\.|$)", re.ASCII)
_EXAMPLE = "expected key=value, for example train.learning_rate=1e-3"


def apply_override(document: Document, text: str) -> None:
    """Set one value in the document, which holds a mapping; a wrong text becomes its fault.

    A key in what is no mapping yet makes it one; `evaluation.0.limit=5` reaches list items; an
    empty value is null.
    """
    key, equals, value_text = text.partition("=")
    keys = _INDEX.sub(r".\1", key.strip()).split(".")
    if not equals or not all(keys):
        problem = "has no '='" if not equals else "has an empty key"
        document.faults.append(Fault(text, (), f"{problem}; {_EXAMPLE}"))
        return
    if len(value_text) > MAX_BYTES:
        document.faults.append(Fault(text, (), f"is longer than {MAX_BYTES} characters"))
        return
    value = read_yaml(value_text)
    if value.faults and not value.origins:  # Not YAML at all: there is no value to set.
        advice = f"; text with colons, braces or hashes: '{key.strip()}=\"...\"'"
        document.faults += [
            Fault(text, (), message + advice * message.startswith("not valid YAML"))
            for _, _, message in value.faults
        ]
        return
    _place(document, keys, value, text)


def _place(document: Document, keys: list[str], value: Document, text: str) -> None:
    """Walk down to the last key and set the value there."""
    container: Any = None
    inner: Any = document.value
    path: Path = ()
    for key in keys:
        if not isinstance(inner, dict | list):
            # `adapter.factor_shape.n=8` makes a mapping of what was the text "balanced".
            inner = container[path[-1]] = {}
            document.origins[path] = text
        container = inner
        if isinstance(container, dict):
            path = (*path, key)
            inner = container.get(key)
        elif key in map(str, range(len(container))):
            path = (*path, int(key))
            inner = container[int(key)]
        else:
            message = f"is a list of {len(container)}; expected a number below that, got {key}"
            document.faults.append(Fault(text, path, message))
            return
    container[path[-1]] = value.value
    for old in [old for old in document.origins if old[: len(path)] == path]:
        del document.origins[old]
    document.origins[path] = text
    document.faults += [Fault(text, path + fault.path, fault.message) for fault in value.faults]
