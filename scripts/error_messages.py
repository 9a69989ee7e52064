"""Which paragraph of docs/troubleshooting.md treats which message, read off the code.

A paragraph begins with a heading and a comment that says which errors it treats, by class and by
the place in the package where they are raised:

    ## The base model
    <!-- messages: ModelError models/ decompose/ -->

Every error must have its paragraph: of several that fit, the one with the longest place. Python:
`treated()` gives the messages of each heading, and refuses what is not treated. scripts/docs puts
the messages themselves below each paragraph of the site, where its search finds them.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kpsvd_tune import errors

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
PACKAGE = ROOT / "kpsvd_tune"
CLASSES = {
    name
    for name, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, errors.KpsvdTuneError)
}
# "## Heading", then the comment with its rules: lines of a class and places.
_PARAGRAPH = re.compile(r"^## (?P<heading>.+)\n+<!-- messages:(?P<rules>[^>]*)-->\n", re.MULTILINE)
GAP = "…"  # where a message holds a name or a number


@dataclass(frozen=True)
class Message:
    """One place where an error is made."""

    kind: str  # the class
    file: str  # of the package, such as models/source.py
    line: int
    text: str  # with GAP for what is filled in; "" where it is put together elsewhere


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, and the errors that it treats."""

    heading: str
    rules: tuple[tuple[str, str], ...]  # class and place


@cache
def messages() -> tuple[Message, ...]:
    """Every place of the package that makes an error of `kpsvd_tune.errors`."""
    return tuple(_messages())


def _messages() -> Iterator[Message]:
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (kind := _name(node.func)) in CLASSES and node.args:
                text = re.sub(rf"[{GAP}\s]+$", "", _text(node.args[0]))
                place = file.relative_to(PACKAGE).as_posix()
                yield Message(kind, place, node.lineno, text if re.search("[a-z]", text) else "")


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _text(node: ast.expr) -> str:
    """What is written in the code of a message."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(each) for each in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return GAP


def paragraphs(page: str) -> list[Paragraph]:
    """The paragraphs of the page that treat errors."""
    found = []
    for match in _PARAGRAPH.finditer(page):
        rules = []
        for line in match["rules"].split(";"):
            kind, *places = line.split()
            if kind not in CLASSES:
                raise ValueError(f"{match['heading']}: there is no error {kind}")
            rules += [(kind, place) for place in places or [""]]
        found.append(Paragraph(match["heading"], tuple(rules)))
    return found


def treated(page: str) -> dict[str, list[Message]]:
    """The messages of each heading.

    Raises:
        ValueError: A message has no paragraph, or a paragraph no message.
    """
    known = paragraphs(page)
    found: dict[str, list[Message]] = {paragraph.heading: [] for paragraph in known}
    used: set[tuple[str, str]] = set()
    for message in messages():
        fitting = [
            (len(place), paragraph.heading, (kind, place))
            for paragraph in known
            for kind, place in paragraph.rules
            if kind == message.kind and message.file.startswith(place)
        ]
        if not fitting:
            raise ValueError(
                f"kpsvd_tune/{message.file}:{message.line}: docs/troubleshooting.md has no "
                f"paragraph for a {message.kind} from there ({message.text!r}). Write one, or "
                "name the place in the comment below the heading of the one that helps"
            )
        _, heading, rule = max(fitting)
        found[heading].append(message)
        used.add(rule)
    idle = {rule for paragraph in known for rule in paragraph.rules} - used
    if idle:
        raise ValueError(f"docs/troubleshooting.md treats errors that nothing raises: {idle}")
    return found


def filled(page: str) -> str:
    """The page with the messages below each paragraph, folded away."""
    found = treated(page)

    def listed(match: re.Match[str]) -> str:
        texts = sorted({" ".join(each.text.split()) for each in found[match["heading"]]} - {""})
        if not texts:
            return match[0]
        rows = "\n".join(f"    - `{text.replace('`', chr(39))}`" for text in texts)
        return f'{match[0]}\n??? note "The messages ({len(texts)})"\n\n{rows}\n\n'

    return _PARAGRAPH.sub(listed, page)
