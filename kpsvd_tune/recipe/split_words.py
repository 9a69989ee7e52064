"""Overrides that a shell has split at spaces, or expanded, because nothing stood in quotes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from kpsvd_tune.recipe.reading import read_yaml

_CLOSING = {"{": "}", "[": "]"}
_SPLIT = "a shell has split this word: put quotes around it, as in {}"
# What bash makes of `columns={prompt:a,completion:b}`: a word for each part, with the key before.
_EXPANDED = re.compile(r"(?P<key>[^=\s]+)=(?P<name>\w+):(?P<value>\S+)")


def unsplit(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The overrides, each with what is wrong where a shell has changed it (None: nothing).

    The words that belong to a split one are given with it as one.
    """
    place = 0
    while place < len(words):
        number, fault = _split(words[place:]) or _expanded(words[place:]) or (1, None)
        yield words[place], fault
        place += number


def _split(words: Sequence[str]) -> tuple[int, str] | None:
    """How many words were one with a brace or a bracket, and what to write."""
    value = words[0].partition("=")[2].strip()
    close = _CLOSING.get(value[:1])
    if close is None or _is_whole(value):
        return None
    for number in range(2, len(words) + 1):
        if "=" in words[number - 1]:
            break
        joined = " ".join(words[:number])
        if joined.endswith(close) and _is_whole(joined.partition("=")[2]):
            return number, _SPLIT.format(shlex.quote(joined))
    open_ended = shlex.quote(f"{words[0]} ...{close}")
    return 1, (
        f"begins with {value[0]} and is not closed: write the {close}, and quotes around the whole "
        f"word, which a shell splits at spaces: {open_ended}"
    )


def _is_whole(value: str) -> bool:
    found = read_yaml(value)
    return bool(found.origins) or not found.faults


def _expanded(words: Sequence[str]) -> tuple[int, str] | None:
    """How many words were one with braces, and what to write."""
    found: list[re.Match[str]] = []
    for word in words:
        part = _EXPANDED.fullmatch(word)
        if part is None or (found and part["key"] != found[0]["key"]):
            break
        found.append(part)
    if len(found) < 2:
        return None
    inner = ", ".join(f"{part['name']}: {part['value']}" for part in found)
    return len(found), _SPLIT.format(shlex.quote(f"{found[0]['key']}={{{inner}}}"))
