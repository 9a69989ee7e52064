"""YAML text to plain values, safely, with the line of every key; and overrides put into them.

Stricter than YAML: no aliases (they can expand without bound), no tags (they can build objects),
no duplicate keys, one document, bounded depth and size, no numbers in base 8 or 60 that look like
others. Dates stay text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

MAX_BYTES = 2**20
_MAX_DEPTH = 20
_BEGUN_BEFORE = ("while scanning a simple key", "while scanning a quoted", "while parsing a flow")
# A line that can have a mapping below it, or beside it: a key, an item of a list, a comment.
_KEY = re.compile(r"\s*(#|-(\s|$)|[^\s#].*?:(\s|$))")
_NO_KEY = "not valid YAML: expected key: value, with a colon and a space after the key; got"
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
_INDEX = re.compile(r"\[(\d{1,9})\](?=\.|$)", re.ASCII)
_EXAMPLE = "expected key=value, for example train.learning_rate=1e-3"


Path = tuple[str | int, ...]


class Line(NamedTuple):
    """A line of a file."""

    file: str  # as messages call it
    number: int


Origin = Line | str | None  # a line, the override as typed, or unknown


class Fault(NamedTuple):
    """One thing that is wrong."""

    origin: Origin
    path: Path  # keys as the user wrote them
    message: str  # what was got, what was expected, what to do


@dataclass
class Document:
    """Plain values, where each came from, and what is wrong with them."""

    value: object = None
    origins: dict[Path, Line | str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    num_unlisted: int = 0  # Faults beyond those listed, where there are too many to look at.

    def origin_of(self, path: Path, others: tuple[str, ...] = ()) -> Origin:
        """Where a value came from; of a conflict with `others` the override among them if any."""
        keys = [path, *((*path[:-1], other) for other in others)]
        found = [self.origins[key] for key in keys if key in self.origins]
        found.sort(key=lambda origin: isinstance(origin, Line))
        above = (path[:length] for length in range(len(path) - 1, -1, -1))
        found += [self.origins[key] for key in above if key in self.origins]
        return found[0] if found else None


def read_yaml(text: str, file: str = "") -> Document:
    """Read one YAML document of at most a mebibyte, a limit that the caller keeps.

    ``file`` is what messages call it. Text that is not YAML gives one fault and no value; duplicate
    keys and unusable scalars are faults beside a value, so that the rest can still be checked.
    """
    document = Document()
    try:
        loader = _Loader(text, file)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"holds the character U+{error.character:04X}, which YAML does not allow"
        document.faults.append(Fault(Line(file, line), (), message))
        return document
    except yaml.MarkedYAMLError as error:
        document.faults.append(_syntax_fault(error, text, file))
        return document
    except (ValueError, OverflowError) as error:  # Of escapes beyond Unicode, such as "\UFFFFFFFF".
        document.faults.append(Fault(None, (), f"not valid YAML: {error}"))
        return document
    if node is not None:
        document.value = _build(loader, node, (), document)
    return document


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._file = file

    def line_of(self, node: yaml.Node) -> Line:
        return Line(self._file, node.start_mark.line + 1)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self._refuse("aliases (*name) are not allowed; write the value out", event)
        if tag := getattr(event, "tag", None):
            self._refuse(f"tags such as {tag!r} are not allowed; write a plain value", event)
        if self._depth > _MAX_DEPTH:
            self._refuse(f"nested more than {_MAX_DEPTH} levels deep", event)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    @staticmethod
    def _refuse(problem: str, event: yaml.Event) -> None:
        raise yaml.composer.ComposerError(None, None, problem, event.start_mark)  # type: ignore[arg-type]


def _syntax_fault(error: yaml.MarkedYAMLError, text: str, file: str) -> Fault:
    mark = error.problem_mark or error.context_mark
    message = f"{error.problem or error.context}"
    if not (isinstance(error, yaml.composer.ComposerError) and error.context is None):
        message = f"not valid YAML: {message}"
    if "'\\t'" in message:
        message += "; indent with spaces, not with tabs"
    # PyYAML notices some faults at what follows them; these began where their context does.
    if error.context and error.context.startswith(_BEGUN_BEFORE) and error.context_mark:
        if mark and mark.line > error.context_mark.line:
            message += f" on line {mark.line + 1}"
        mark = error.context_mark
    line = mark.line if mark else 0
    if "mapping values are not allowed" in message:
        lines = text.splitlines()
        above = max((n for n in range(min(line, len(lines))) if lines[n].strip()), default=0)
        # Without its colon a key, or a pair of key and value, is text that goes on below.
        if lines and line != above and not _KEY.match(lines[above]):
            line, message = above, f"{_NO_KEY} {_line(text, above)!r}"
        else:
            message += "; check the indentation, or put a text that holds a colon in quotes"
    elif "could not find expected ':'" in message:
        message = f"{_NO_KEY} {_line(text, line)!r}"
    elif "end of stream" in message and error.context and "scalar" in error.context:
        message = f"not valid YAML: these quotes are never closed: {_line(text, line)!r}"
    elif "<block end>" in message:
        message += "; check the indentation and the quotes"
    return Fault(Line(file, line + 1) if mark else None, (), message)


def _line(text: str, index: int) -> str:
    lines = text.splitlines()
    return lines[index].strip()[:60] if index < len(lines) else ""


def _build(loader: _Loader, node: yaml.Node, path: Path, document: Document) -> object:
    document.origins.setdefault(path, loader.line_of(node))
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(loader, item, (*path, index), document) for index, item in enumerate(node.value)
        ]
    return _build_scalar(loader, node, path, document)


def _build_mapping(
    loader: _Loader, node: yaml.MappingNode, path: Path, document: Document
) -> dict[str, object]:
    mapping: dict[str, object] = {}
    for key_node, value_node in node.value:
        line = loader.line_of(key_node)
        if not (isinstance(key_node, yaml.ScalarNode) and _is_unicode(key_node.value)):
            document.faults.append(Fault(line, path, "holds a key that is not plain text"))
            continue
        # The text itself, so that `no:` and `1:` are the keys "no" and "1".
        key: str = key_node.value
        if key in mapping:
            first = document.origins[(*path, key)]
            message = f"given twice, on lines {_number(first)} and {line.number}; keep one"
            document.faults.append(Fault(line, (*path, key), message))
            continue
        document.origins[(*path, key)] = line
        mapping[key] = _build(loader, value_node, (*path, key), document)
    return mapping


def _number(origin: Line | str) -> int | str:
    return origin.number if isinstance(origin, Line) else origin


def _build_scalar(loader: _Loader, node: yaml.Node, path: Path, document: Document) -> object:
    value: object = node.value
    fault = None
    if node.tag in _PLAIN_TAGS:
        try:
            value = loader.construct_object(node)
        except ValueError:  # Of `0x_`, or of thousands of digits.
            fault = "is not a number that can be read"
        if isinstance(value, int) and abs(value) >= 2**63:
            fault = "is an integer of more than 64 bits"
        elif base := _surprising_base(node.value):
            fault = (
                f"got {node.value[:40]}, which YAML reads as {value} (in base {base}); expected a "
                f"number in base 10, such as {value}, or text in quotes"
            )
    elif not _is_unicode(node.value):
        fault = "holds half of a surrogate pair, which is no character"
    if fault:
        document.faults.append(Fault(document.origins[path], path, fault))
        return None
    return value


def _surprising_base(text: str) -> int | None:
    """The base that YAML 1.1 reads a number in where people read 10; 0x and 0b say it themselves.

    A leading 0 means base 8, and colons base 60, made for times of day.
    """
    if ":" in text:
        return 60
    digits = text.lstrip("+-").replace("_", "")
    is_octal = digits.isdecimal() and digits.startswith("0") and len(digits.lstrip("0")) > 1
    # 08 and 09 are text to YAML; 00 to 07 are what they seem.
    return 8 if is_octal else None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def apply_override(document: Document, text: str, within: str = "") -> None:
    """Set one value in the document, which holds a mapping; a wrong text becomes its fault.

    A key in what is no mapping yet makes it one; `evaluation.0.limit=5` reaches list items; an
    empty value is null. Keys are those of the mapping `within`, such as "evaluation.0.".
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
    _place(document, [*within.split(".")[:-1], *keys], value, text)


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
