"""Recipe files made of parts, as text: one that names its parts, or a whole one with comments."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.recipe.extending import JOIN, read_extended
from kpsvd_tune.recipe.faults import LEVELS
from kpsvd_tune.recipe.files import locate, read_text, shipped_parts
from kpsvd_tune.recipe.heads import combinations, head_of
from kpsvd_tune.recipe.loading import load_recipe, value_to_yaml
from kpsvd_tune.recipe.reading import Document, Line
from kpsvd_tune.recipe.reading import Path as Place
from kpsvd_tune.recipe.reference import MODELINE
from kpsvd_tune.recipe.schema import Recipe
from kpsvd_tune.units import size

_COMMENT = re.compile(r"\s{2,}# (.*)$")
_COLUMN = 34  # where comments begin
_WIDTH = 100
# What task parts say of rows that the user has.
_OWN_ROWS = "rows.jsonl"


def joined_text(name: str, file: Path) -> str:
    """A recipe that extends parts joined by +, to be written to a file.

    Raises:
        RecipeError: The parts are no whole recipe together.
    """
    recipe = load_recipe(name)
    dataset = recipe.dataset
    lines = [*_head(name, file), "", "extends:"]
    lines += [f"  - {value_to_yaml(each)}" for each in _from(file.parent, name.split(JOIN))]
    if dataset is not None and dataset.path == _OWN_ROWS:
        lines += ["dataset:", _with_comment(f"  path: {_OWN_ROWS}", "your rows")]
    lines += [f"output_dir: {value_to_yaml(f'runs/{file.stem}')}"]
    return "\n".join(lines) + "\n"


def resolved_text(name: str, file: Path) -> str:
    """A recipe without `extends`: all that its parts say, each key with a comment.

    A comment is that of the part, or else what the key means.

    Raises:
        RecipeError: It is no whole recipe.
    """
    load_recipe(name)
    _, document = read_extended(name)
    assert isinstance(document.value, dict)
    document.value.pop("extends", None)
    if JOIN in name:
        document.value["output_dir"] = f"runs/{file.stem}"
    order = [field.alias or key for key, field in Recipe.model_fields.items()]
    document.value = dict(sorted(document.value.items(), key=lambda item: order.index(item[0])))
    texts: dict[str, list[str]] = {}
    body: list[str] = []
    for line in _lines(document, document.value, (), texts):
        # A blank line before each section, as the shipped recipes have it.
        body += ["", line] if not line.startswith(" ") else [line]
    return "\n".join([*_head(name, file), *body]) + "\n"


def _head(name: str, file: Path) -> list[str]:
    """The opening comment of a recipe made of these parts."""
    shipped = shipped_parts()
    names = name.split(JOIN)
    heads = [head_of(shipped[each]) for each in names if each in shipped]
    options = " ".join(head["Options"] for head in heads if "Options" in head)
    sizes = {each.name: each.memory_bytes for each in combinations()}
    lines = [MODELINE]
    for field in ("Purpose", "Needs"):
        said = [head[field].rstrip(".") for head in heads if field in head]
        lines += _wrapped(field, f"{'; '.join(said) or 'that of ' + ', '.join(names)}.")
    if name in sizes:
        told = f"{size(sizes[name])} on each device by `plan`, every row being as long as may be."
        lines += _wrapped("Memory", told)
    lines += _wrapped("Command", f"kpsvd-tune train {shlex.quote(str(file))} {options}".strip())
    return lines


def _wrapped(field: str, text: str) -> list[str]:
    lines: list[str] = []
    start = f"# {field + ':':<8} "
    for word in text.split():
        if lines and len(lines[-1]) + len(word) < _WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append((start if not lines else f"#{' ' * (len(start) - 1)}") + word)
    return lines


def _from(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """The parts as a file in that folder names them."""
    for each in names:
        name, file = locate(each.strip())
        yield name if name in shipped_parts() else os.path.relpath(file, folder)


def _lines(
    document: Document, value: dict[str, Any], path: Place, texts: dict[str, list[str]]
) -> Iterator[str]:
    indent = "  " * sum(1 for step in path if isinstance(step, str))
    indent += "  " * sum(1 for step in path if isinstance(step, int))
    for key, each in value.items():
        place = (*path, key)
        start = f"{indent}{value_to_yaml(key)}:"
        items = each if isinstance(each, list) else []
        if isinstance(each, dict) and _has_keys(place):
            yield start
            yield from _lines(document, each, place, texts)
        elif items and all(isinstance(item, dict) for item in items):
            yield start
            for index, item in enumerate(items):
                inner = list(_lines(document, item, (*place, index), texts))
                width = len(indent) + 2
                yield f"{inner[0][:width]}- {inner[0][width + 2 :]}"
                yield from inner[1:]
        else:
            text = f"{start} {value_to_yaml(each)}"
            yield _with_comment(text, _comment(document, place, texts))


def _has_keys(place: Place) -> bool:
    """Whether the keys below have meanings of their own to tell; columns and the like have not."""
    level = tuple(step for step in place if isinstance(step, str))
    return level in LEVELS and level[-1] != "columns"


def _comment(document: Document, place: Place, texts: dict[str, list[str]]) -> str:
    origin = document.origins[place]
    assert isinstance(origin, Line)  # nothing was typed
    if origin.file not in texts:
        try:
            texts[origin.file] = read_text(*locate(origin.file)).split("\n")
        except RecipeError:  # of a name that messages show in quotes
            texts[origin.file] = []
    lines = texts[origin.file]
    if origin.number <= len(lines) and (own := _COMMENT.search(lines[origin.number - 1])):
        return own[1]
    level = tuple(step for step in place[:-1] if isinstance(step, str))
    return LEVELS.get(level, {}).get(str(place[-1]), "").partition(";")[0]


def _with_comment(text: str, comment: str) -> str:
    line = f"{text:<{_COLUMN - 2}}  # {comment}"
    return line if comment and len(line) <= _WIDTH else text
