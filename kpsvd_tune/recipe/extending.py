"""`extends`: one document made of a recipe and the parts that it names.

Parts are merged in the order in which they are named, and the recipe's own keys come last: of two
values the later one wins, mappings are merged key by key, lists and all other values replaced. The
arguments of a schedule or an optimiser go with its name. A part that is reached twice counts once,
where it is named first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path as FilePath
from typing import Any

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.recipe.files import locate, read_text, shipped_parts
from kpsvd_tune.recipe.reading import Document, Fault, Line, Path, read_yaml
from kpsvd_tune.recipe.schema import Recipe
from kpsvd_tune.recipe.values import show
from kpsvd_tune.storage.paths import expand

JOIN = "+"  # of parts that are named together on the command line
EXAMPLE = "models/qwen3-0.6b+tasks/chat+machines/gpu-24gb"
_MAX_PARTS = 100
_KEY = "extends"
# Two ways to set one thing, of which the later one takes the place of the other.
_ONE_OF = (
    (("train", "epochs"), ("train", "max_steps")),
    (("train", "warmup_ratio"), ("train", "warmup_steps")),
    (("adapter", "factor_shape"), ("adapter", "factor_size")),
)
# Arguments of a choice, which mean nothing to another choice.
_ARGUMENTS_OF = (
    (("train", "scheduler"), ("train", "scheduler_args")),
    (("train", "optimizer"), ("train", "optimizer_args")),
)


def read_extended(path: str | os.PathLike[str]) -> tuple[str, Document]:
    """Read a recipe with all that it extends.

    Args:
        path: A file, the name of a shipped recipe, or names of parts joined by `+`.

    Returns:
        What messages call the recipe, and the merged document; its key `extends` lists the parts.

    Raises:
        RecipeError: The file cannot be found or read. What is wrong with its parts are faults.
    """
    text = os.fspath(path)
    if JOIN in text and not os.path.exists(expand(text)):
        names = [each.strip() for each in text.split(JOIN)]
        line = Line(text, 1)
        origins: dict[Path, Line | str] = {(): line, (_KEY,): line}
        name, own, folder = text, Document({_KEY: names}, origins), FilePath()
        key = text
    else:
        name, file = locate(path)
        if name in shipped_parts():
            raise RecipeError(
                f"{name}: is a part of a recipe; expected a whole one: join a model, a task and a "
                f"machine, as in {EXAMPLE}, or name it under `extends` of your own"
            )
        own, folder = read_yaml(read_text(name, file), name), file.parent
        key = os.path.realpath(file)
    if not (isinstance(own.value, dict) and _KEY in own.value):
        return name, own
    parts = _Parts()
    parts.add(own, name, folder, key)
    merged = Document({}, {(): own.origins[()]})
    for each in parts.documents:
        _merge(merged, each)
    if isinstance(merged.value, dict) and len(parts.names) > 1:
        merged.value[_KEY] = parts.names[:-1]
        merged.origins[_KEY,] = own.origins[_KEY,]
    return name, merged


class _Parts:
    """Documents in the order in which they are merged: each after all that it extends."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.names: list[str] = []
        self._open: dict[str, str] = {}  # file -> name, from the recipe down to where we are
        self._done: set[str] = set()

    def add(self, document: Document, name: str, folder: FilePath, key: str) -> None:
        """Add a document and, before it, what it extends; ``key`` is its file."""
        self._open[key] = name
        for place, part in _named_parts(document):
            try:
                self._add_part(part, folder)
            except RecipeError as error:
                origin = document.origin_of(place)
                document.faults.append(Fault(origin, place, str(error)))
        del self._open[key]
        self._done.add(key)
        self.documents.append(document)
        self.names.append(name)

    def _add_part(self, part: str, folder: FilePath) -> None:
        name, file = locate(part, folder)
        key = os.path.realpath(file)
        if key in self._open:
            circle = list(self._open.values())[list(self._open).index(key) :]
            way = " extends ".join([*circle, name])
            raise RecipeError(f"a circle, which has no end: {way}; take one of them out")
        if key in self._done:
            return
        if len(self._done) >= _MAX_PARTS:
            raise RecipeError(f"more than {_MAX_PARTS} parts in all; expected fewer")
        document = read_yaml(read_text(name, file), name)
        document.faults = [
            fault if fault.origin else fault._replace(origin=Line(name, 1))
            for fault in document.faults
        ]
        if not isinstance(document.value, dict):
            got = "nothing" if document.value is None else show(document.value)
            message = f"got {got}; expected a mapping with some keys of a recipe"
            found = document.faults or [Fault(Line(name, 1), (), message)]
            document = Document({}, {(): Line(name, 1)}, found)
        self.add(document, name, file.parent, key)


def _named_parts(document: Document) -> Iterator[tuple[Path, str]]:
    """The parts that a document names, with their places; the key is taken out, faults told."""
    assert isinstance(document.value, dict)
    if _KEY not in document.value:
        return
    value = document.value.pop(_KEY)
    listed = value if isinstance(value, list) else [value]
    for index, each in enumerate(listed):
        place: Path = (_KEY, index) if isinstance(value, list) else (_KEY,)
        if isinstance(each, str) and each.strip() and "\0" not in each:
            yield place, each
        elif value is not None:
            message = (
                f"got {show(each)}; expected the path of a recipe, or the name of a shipped part"
            )
            document.faults.append(Fault(document.origin_of(place), place, message))


def _merge(below: Document, above: Document) -> None:
    """Put the values of `above` into `below`."""
    below.faults += above.faults
    for ways in _ONE_OF:
        for own, other in (ways, ways[::-1]):
            if _value(above, own) is not None and _value(above, other) is None:
                _remove(below, other)
    for choice, arguments in _ARGUMENTS_OF:
        if _value(above, choice) not in (None, _value(below, choice)):
            _remove(below, arguments)
    _merge_mapping(below, above, ())


def _merge_mapping(below: Document, above: Document, path: Path) -> None:
    held, given = _value(below, path), _value(above, path)
    for key, value in given.items():
        place = (*path, key)
        if isinstance(value, dict) and isinstance(held.get(key), dict):
            below.origins[place] = above.origins[place]
            _merge_mapping(below, above, place)
            continue
        is_held = key in held
        _remove(below, place)
        if value is None and is_held and not takes_null(place):
            continue
        held[key] = value
        below.origins |= {each: above.origins[each] for each in _places(value, place)}


def _value(document: Document, path: Path) -> Any:
    value: Any = document.value
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _remove(document: Document, path: Path) -> None:
    section = _value(document, path[:-1])
    if isinstance(section, dict) and path[-1] in section:
        for old in _places(section.pop(path[-1]), path):
            del document.origins[old]


def _places(value: Any, path: Path) -> Iterator[Path]:
    """The place of a value and those of all within it, each of which has an origin."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    for step, each in enumerate(value) if isinstance(value, list) else inner:
        yield from _places(each, (*path, step))


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema(by_alias=True)


def takes_null(path: Path) -> bool:
    """Whether null is a value that the key at this place can have; else it means: as if left out.

    A key that the schema does not know takes none.
    """
    schema = _schema()
    known = schema["$defs"]
    found: list[Any] = [schema]
    for step in path:
        found = [inner for each in _forms(found, known) for inner in _below(each, step)]
    forms = list(_forms(found, known))
    return any(each.get("type") == "null" or not each.keys() & {"type", "enum"} for each in forms)


def _forms(schemas: list[Any], known: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The alternatives of each schema."""
    for each in schemas:
        if "$ref" in each:
            yield from _forms([known[each["$ref"].rpartition("/")[2]]], known)
        elif several := each.get("anyOf", each.get("oneOf")):
            yield from _forms(several, known)
        else:
            yield each


def _below(schema: Mapping[str, Any], step: str | int) -> Iterator[Any]:
    """The schema of a key within a mapping."""
    if step in schema.get("properties", {}):
        yield schema["properties"][step]
    elif more := schema.get("additionalProperties"):
        yield {} if more is True else more  # {}: anything
