"""Check that a rendered chat holds all that its messages say, or that the rest is told of.

A chat template takes what it knows of a message and leaves out the rest without a word: calls of
tools, reasoning, whole roles. What is not found in the text as it stands is put to the proof:
the chat is rendered again with a mark in its place, and the mark has to show up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpsvd_tune.data.columns import is_empty
from kpsvd_tune.errors import DataError

Message = Mapping[str, Any]
# Messages and tools to text.
Render = Callable[[Sequence[Message], Any], str]

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")
# Known to every check here, or of no meaning to a model.
_KNOWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", *REASONING_KEYS}
# A shorter text may be found in a rendering by chance.
_TELLING = 16
# Rows to try a key of no known meaning on before it is taken for one that is never written.
_TRIES = 3
_OTHER_TEMPLATE = (
    "use another template that writes it (dataset.chat_template: the name of one that comes with "
    "kpsvd-tune, or a file), or a model whose own does"
)


class WrittenCheck:
    """The check for one chat template.

    Args:
        render: Renders messages and tools.
        notes: Gets what a user should know.
    """

    def __init__(self, render: Render, notes: dict[str, None]) -> None:
        self._render = render
        self._notes = notes
        self._tries: dict[tuple[str, str], int] = {}

    def check(
        self, messages: Sequence[Message], tools: Any, turns: Mapping[int, str], text: str
    ) -> None:
        """Compare a rendering with what was to be rendered.

        Args:
            messages: The chat.
            tools: What its assistant may call.
            turns: Text of each turn that is learnt, by its place.
            text: The whole rendering.

        Raises:
            DataError: A part that carries content is not in the text.
        """
        if tools and not self._has_tools(messages, tools, text):
            raise DataError(
                "the chat template does not write the row's tools, so calls would be learnt "
                f"without them; expected them in the text: {_OTHER_TEMPLATE}, or leave them out "
                "with dataset.ignore_columns: [tools] (or functions)"
            )
        doubts = [
            doubt
            for place, message in enumerate(messages)
            for doubt in _doubts(place, message, turns.get(place), text)
        ]
        self._settle(doubts, messages, tools, max(turns))
        for place, message in enumerate(messages):
            for key, value in message.items():
                if key not in _KNOWN_KEYS and not is_empty(value):
                    self._try_key(place, key, messages, tools)

    def _has_tools(self, messages: Sequence[Message], tools: Any, text: str) -> bool:
        if all(json.dumps(tool, ensure_ascii=False) in text for tool in tools):
            return True
        return self._render(messages, None) != self._render(messages, tools)

    def _settle(
        self, doubts: Sequence[_Doubt], messages: Sequence[Message], tools: Any, last: int
    ) -> None:
        if not doubts:
            return
        changed: list[Message] = list(messages)
        marks = [f"Qz{number}zQ" for number in range(len(doubts))]
        for doubt, mark in zip(doubts, marks, strict=True):
            changed[doubt.place] = doubt.replaced(changed[doubt.place], mark)
        try:
            rendered = self._render(changed, tools)
        except DataError:  # the template looks at what stands there: one by one, then
            rendered = ""
        for doubt, mark in zip(doubts, marks, strict=True):
            if mark in rendered:
                continue
            if doubt.is_reasoning and not doubt.is_learnt:
                self._notes[
                    "the chat template leaves the reasoning of turns that are not learnt out of "
                    "the text, as it does in use"
                ] = None
            elif not self._changes(doubt, mark, messages, tools):
                raise DataError(doubt.message(is_last=doubt.place == last))

    def _changes(self, doubt: _Doubt, mark: str, messages: Sequence[Message], tools: Any) -> bool:
        """Whether the rendering is another with a mark in place of the part."""
        changed: list[Message] = list(messages)
        changed[doubt.place] = doubt.replaced(changed[doubt.place], mark)
        try:
            return self._render(changed, tools) != self._render(messages, tools)
        except DataError:
            return True  # it was looked at

    def _try_key(self, place: int, key: str, messages: Sequence[Message], tools: Any) -> None:
        message = messages[place]
        known = (str(message["role"]), key)
        tries = self._tries.get(known, 0)
        if tries < 0 or tries >= _TRIES and key not in _MEDIA_KEYS:
            return
        without: list[Message] = list(messages)
        without[place] = {name: value for name, value in message.items() if name != key}
        note = (
            f"the chat template does not write the key {key!r} of {known[0]} messages: the model "
            "never sees it"
        )
        try:
            is_written = self._render(without, tools) != self._render(messages, tools)
        except DataError:
            is_written = True
        if is_written:
            self._tries[known] = -1
            self._notes.pop(note, None)
            return
        if key in _MEDIA_KEYS:
            raise DataError(
                f"a message has {key!r}, which the chat template does not write; expected text "
                "alone, since only texts are trained here: remove the key or the row"
            )
        self._tries[known] = tries + 1
        self._notes[note] = None


@dataclass(frozen=True)
class _Doubt:
    """A part of a message that is not surely in the text.

    Attributes:
        place: The message's.
        path: Keys and places that lead to the part.
        role: The message's.
        what: The part, as a message names it.
        is_learnt: Whether the message is.
    """

    place: int
    path: tuple[str | int, ...]
    role: str
    what: str
    is_learnt: bool

    @property
    def is_reasoning(self) -> bool:
        """Whether it is what an assistant thought before it spoke."""
        return self.path[0] in REASONING_KEYS

    def replaced(self, message: Message, mark: str) -> dict[str, Any]:
        """The message with a mark in place of the part.

        Reasoning is often held under several names, of which a template reads any.
        """
        paths = [self.path]
        if self.is_reasoning:
            text = message[self.what]
            paths = [(key,) for key in REASONING_KEYS if message.get(key) == text]
        changed = dict(message)
        for path in paths:
            changed = _replaced(changed, path, mark)
        return changed

    def message(self, *, is_last: bool) -> str:
        """What a user has to know where the template leaves the part out."""
        key = self.path[0]
        if key == "tool_calls":
            return (
                f"the chat template does not write {self.what}, so the assistant's turn would "
                "be learnt as if it stopped without it; expected calls in the text: "
                f"{_OTHER_TEMPLATE}, or write the call into the message's text, or remove the row"
            )
        if self.is_reasoning:
            earlier = (
                "; dataset.learn: each, or last, where it leaves out that of earlier turns only"
            )
            return (
                f"the chat template does not write {key!r} of an assistant message, so the "
                f"reasoning would be lost; expected it in the text: {_OTHER_TEMPLATE}, or remove "
                f"the key from the rows{'' if is_last else earlier}"
            )
        return (
            f"the chat template does not write {self.what}; expected every message in the text: "
            f"{_OTHER_TEMPLATE}, or remove messages of the role {self.role!r} from the rows"
        )


def _doubts(place: int, message: Message, turn: str | None, text: str) -> Iterator[_Doubt]:
    """The parts of a message that are not surely in the text of its turn, or of the chat."""
    role, content = str(message["role"]), str(message["content"]).strip()
    is_learnt = turn is not None
    # What is learnt must be in its own turn, and beside the text rather than in it.
    rest = text if turn is None else turn.replace(content, "", 1)
    has_more = message.get("tool_calls") or any(message.get(key) for key in REASONING_KEYS)
    # The text of a learnt turn has been compared already; a short one may be part of a call.
    is_compared = is_learnt and not (has_more and len(content) < _TELLING)
    if content and not is_compared and not _is_surely_in(content, text):
        yield _Doubt(place, ("content",), role, f"a message of the role {role!r}", is_learnt)
    reasoning: dict[str, str] = {}
    for key in REASONING_KEYS:
        value = message.get(key)
        if isinstance(value, str) and value.strip():
            reasoning.setdefault(value.strip(), key)
    for value, key in reasoning.items():
        if not _is_surely_in(value, rest):
            yield _Doubt(place, (key,), role, key, is_learnt)
    for number, call in enumerate(message.get("tool_calls") or ()):
        path: tuple[str | int, ...] = ("tool_calls", number)
        if isinstance(call.get("function"), Mapping):
            call, path = call["function"], (*path, "function")
        yield from _doubts_of_call(place, role, call, path, rest, is_learnt)


def _doubts_of_call(
    place: int, role: str, call: Message, path: tuple[str | int, ...], rest: str, is_learnt: bool
) -> Iterator[_Doubt]:
    name, arguments = call.get("name"), call.get("arguments")
    is_whole = arguments and any(written in rest for written in _json_forms(arguments))
    if not (is_whole and name and f"{name}" in rest):
        yield _Doubt(place, (*path, "name"), role, f"the call of {name!r}", is_learnt)
    if is_whole or not arguments:
        return
    what = f"the arguments of the call of {name!r}"
    if not isinstance(arguments, Mapping):
        yield _Doubt(place, (*path, "arguments"), role, what, is_learnt)
        return
    for key in arguments:
        what = f"the argument {key!r} of the call of {name!r}"
        yield _Doubt(place, (*path, "arguments", key), role, what, is_learnt)


def _is_surely_in(part: str, text: str) -> bool:
    return len(part) >= _TELLING and part in text


def _json_forms(value: Any) -> Iterable[str]:
    for ascii_only in (False, True):
        for separators in ((", ", ": "), (",", ":")):
            yield json.dumps(value, ensure_ascii=ascii_only, separators=separators, default=str)


def _replaced(value: Any, path: Sequence[str | int], mark: str) -> Any:
    if not path:
        return mark
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        return [_replaced(each, rest, mark) if i == step else each for i, each in enumerate(value)]
    return {**value, step: _replaced(value.get(step), rest, mark)}
