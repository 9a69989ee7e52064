"""All keys of a recipe, for editors as a JSON schema and for people as a page of tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kpsvd_tune.recipe.loading import value_to_yaml
from kpsvd_tune.recipe.schema import Recipe

SCHEMA_NAME = "recipe.schema.json"
# What editors look for in the first lines of a YAML file.
MODELINE = f"# yaml-language-server: $schema={SCHEMA_NAME}"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TITLE = "kpsvd-tune recipe"
_PAGE = """\
# Recipe: every key

Made by `kpsvd-tune recipes docs`. Keys with "(needed)" must be given; one that is not listed is an
error. `kpsvd-tune recipes schema` prints the same as a JSON schema, with which editors complete
and check keys ([start.md](start.md)).
"""


def schema_text() -> str:
    """The JSON schema of recipes as a file.

    What a file leaves out may be in a part that it extends, so an editor asks for keys only where
    no part can give them: `model` and `output_dir` of a file without `extends`, and what an item of
    a list needs.
    """
    schema = Recipe.model_json_schema(by_alias=True)
    schema["anyOf"] = [{"required": ["extends"]}, {"required": schema.pop("required")}]
    for name in _mappings(schema):
        schema["$defs"][name].pop("required", None)
    return json.dumps({"$schema": _DIALECT, **schema, "title": _TITLE}, indent=1) + "\n"


def _mappings(schema: Mapping[str, Any]) -> set[str]:
    """The sections that stand in a recipe as mappings, and so are merged key by key."""
    places = _sections(schema["properties"], schema["$defs"], ())
    in_lists = {"evaluation", "dataset.path"}
    return {
        name
        for place, name in places
        if not any(place == each or place.startswith(f"{each}.") for each in in_lists)
    }


def place_schema(folder: Path) -> str | None:
    """Put the schema beside a recipe, where :data:`MODELINE` points to.

    A schema of another version is replaced. Another's file of that name is left alone.

    Returns:
        The name of the file, None where it is another's or cannot be written.
    """
    file = folder / SCHEMA_NAME
    try:
        known = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = None
    except (OSError, UnicodeDecodeError):
        return None
    if known is not None and f'"title": "{_TITLE}"' not in known:
        return None
    if known != schema_text():
        try:
            file.write_text(schema_text(), encoding="utf-8")
        except OSError:
            return None  # an editor's help is not worth the recipe
    return SCHEMA_NAME


def reference_page() -> str:
    """The page docs/recipe.md."""
    schema = Recipe.model_json_schema(by_alias=True)
    places: dict[str, list[str]] = {}
    for place, name in _sections(schema["properties"], schema["$defs"], ()):
        places.setdefault(name, []).append(place)
    tables = [
        "| key | values | default | meaning |",
        "|---|---|---|---|",
        *_rows(schema),
    ]
    lines = [_PAGE, *tables]
    for name, found in places.items():
        section = schema["$defs"][name]
        lines += [
            "",
            f"## {', '.join(found)}",
            "",
            section["description"],
            "",
            *tables[:2],
            *_rows(section),
        ]
    return "\n".join(lines) + "\n"


def _sections(
    properties: Mapping[str, Any], known: Mapping[str, Any], place: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Every mapping within, as its place in a recipe and its name; those within it behind it."""
    for key, value in properties.items():
        for name in dict.fromkeys(_references(value)):
            # One form may stand in several places of a key, such as alone and in a list.
            own = (*place, key)
            yield ".".join(own), name
            yield from _sections(known[name]["properties"], known, own)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        for key, each in value.items():
            if key not in ("default", "description"):
                yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


def _rows(section: Mapping[str, Any]) -> Iterator[str]:
    required = section.get("required", ())
    for key, value in section["properties"].items():
        default = "" if "default" not in value or _is_open(value) else _code(value["default"])
        cells = (
            f"`{key}`",
            _kinds(value),
            "(needed)" if key in required else default,
            value.get("description", ""),
        )
        assert cells[-1], f"{key} has no description"
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _is_open(value: Mapping[str, Any]) -> bool:
    """Whether the default is a mapping whose keys have a table of their own."""
    return isinstance(value["default"], dict) and any(True for _ in _references(value))


def _code(value: Any) -> str:
    return f"`{value_to_yaml(value)}`"


def _kinds(value: Mapping[str, Any]) -> str:
    """What a key may hold, in words."""
    for several in ("anyOf", "oneOf"):
        if several in value:
            return " or ".join(dict.fromkeys(map(_kinds, value[several])))
    if "enum" in value:
        return ", ".join(map(_code, value["enum"]))
    if "const" in value:
        return _code(value["const"])
    if "$ref" in value:
        return "mapping"
    kind = value.get("type")
    if kind == "array":
        return f"list of {_kinds(value['items'])}" if value.get("items") else "list"
    words = {"object": "mapping", "boolean": "`true`, `false`", "string": "text", None: "any"}
    return f"{words.get(kind, kind)}{_limits(value)}"


def _limits(value: Mapping[str, Any]) -> str:
    signs = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    )
    found = [f"{words} {value[key]:,}" for key, words in signs if key in value]
    return f" {', '.join(found)}" if found else ""
