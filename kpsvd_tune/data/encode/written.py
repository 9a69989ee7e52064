"""Check that a rendered chat holds all that its messages say, or that the rest is told of.

A chat template writes the keys of a message that it knows and drops the others silently: calls of
tools, reasoning, whole roles. A part that is not found in the text is tested: the chat is rendered
again with a mark in its place, and the mark has to show up.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from kpsvd_tune.data.encode.messages import MEDIA_KEYS, REASONING_KEYS
from kpsvd_tune.data.encode.tools import function_of
from kpsvd_tune.data.read.columns import is_empty
from kpsvd_tune.errors import DataError

Message = Mapping[str, Any]
# Messages and tools to text, and to the stretches of it that the template marks as learnt.
Render = Callable[[Sequence[Message], Any], tuple[str, Sequence[tuple[int, int]]]]

# Of a message rather than of the row, as few templates read them.
_TOOL_KEYS = ("tools", "functions")
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


class _Rendered(NamedTuple):
    """A chat, what its assistant may call, and the text that both were rendered to."""

    messages: Sequence[Message]
    tools: Any
    text: str


class WrittenCheck:
    """The check for one chat template; `notes` gets what a user should know."""

    def __init__(self, render: Render, notes: dict[str, None]) -> None:
        self._render = render
        self._notes = notes
        self._tries: dict[tuple[str, str], int] = {}

    def check(
        self, messages: Sequence[Message], tools: Any, turns: Mapping[int, str], text: str
    ) -> None:
        """Refuse a rendering that lacks a part of the chat or its tools which carries content.

        `turns` are the texts of the turns that are learnt, by their places.
        """
        chat = _Rendered(messages, tools, text)
        if tools and (lost := self._lost_tools(chat)):
            raise DataError(
                f"the chat template does not write {lost}, so calls would be learnt "
                f"without them; expected them in the text: {_OTHER_TEMPLATE}, or leave them out "
                "with dataset.ignore_columns: [tools] (or functions)"
            )
        said = _Said(messages, tools)
        doubts: list[_Doubt] = []
        for place, message in enumerate(messages):
            # What is learnt must be in its own turn, all else in the chat.
            turn = turns.get(place)
            scope, own = (text, said) if turn is None else (turn, _Said([message], None))
            doubts += _doubts(place, message, scope, own, is_learnt=turn is not None)
        self._settle(doubts, chat, last=max(turns))
        self._check_order_of_results(chat)
        for place, message in enumerate(messages):
            for key, value in message.items():
                if key not in _KNOWN_KEYS and not is_empty(value):
                    self._try_key(place, key, chat)

    def _differs(self, chat: _Rendered, messages: Sequence[Message], tools: Any) -> bool:
        """Whether messages and tools are rendered to another text, or are refused."""
        try:
            return self._render(messages, tools)[0] != chat.text
        except DataError:
            return True  # it was looked at

    def _lost_tools(self, chat: _Rendered) -> str:
        """What of the tools is not in the text, as a message names it; empty where nothing is."""
        tools = chat.tools
        if all(json.dumps(tool, ensure_ascii=False) in chat.text for tool in tools):
            return ""
        if self._render(chat.messages, None)[0] == chat.text:
            return "the row's tools"
        marks = [f"Qz{number}zQ" for number in range(len(tools))]
        renamed = [
            _with_function(tool, {**function_of(tool), "name": mark})
            for tool, mark in zip(tools, marks, strict=True)
        ]
        rendered = ""
        with suppress(DataError):  # the template looks at the names: then one by one
            rendered, _ = self._render(chat.messages, renamed)
        for number, (tool, mark) in enumerate(zip(tools, marks, strict=True)):
            others = [*tools[:number], *tools[number + 1 :]]
            if mark not in rendered and others and not self._differs(chat, chat.messages, others):
                return f"all of the row's tools (missing: {function_of(tool).get('name')!r})"
        self._note_parts(chat)
        return ""

    def _note_parts(self, chat: _Rendered) -> None:
        """Note the keys of tools that the template leaves out, as far as the first one has them."""
        tool, *others = chat.tools
        function = function_of(tool)
        for key in ("description", "parameters"):
            if is_empty(function.get(key)) or not 0 <= self._tries.get(("tools", key), 0) < _TRIES:
                continue
            without = _with_function(tool, {k: v for k, v in function.items() if k != key})
            self._note_key("tools", key, self._differs(chat, chat.messages, [without, *others]))

    def _note_key(self, owner: str, key: str, is_written: bool) -> None:
        """Note a key that no row has shown to be written; one that is written is tried no more."""
        known = (owner, key)
        note = (
            f"the chat template does not write the key {key!r} of {owner}: the model never sees it"
        )
        if is_written:
            self._tries[known] = -1
            self._notes.pop(note, None)
        else:
            self._tries[known] = self._tries.get(known, 0) + 1
            self._notes[note] = None

    def _check_order_of_results(self, chat: _Rendered) -> None:
        """Check that results of tools can be told apart where they stand in another order."""
        for swapped in _swapped_results(chat.messages):
            bare = [
                {k: v for k, v in message.items() if k not in ("tool_call_id", "name")}
                if place in swapped
                else message
                for place, message in enumerate(chat.messages)
            ]
            if not self._differs(chat, bare, chat.tools):
                raise DataError(
                    "the results of tools stand in another order than the calls that they answer, "
                    "and the chat template does not write tool_call_id, so each would be read as "
                    "the answer to another call; expected the order of the calls: sort the "
                    "messages of the role 'tool', or remove the row"
                )

    def _settle(self, doubts: Sequence[_Doubt], chat: _Rendered, *, last: int) -> None:
        """Render with a mark in place of each part in doubt, and refuse one that is not written."""
        if not doubts:
            return
        changed: list[Message] = list(chat.messages)
        marks = [f"Qz{number}zQ" for number in range(len(doubts))]
        for doubt, mark in zip(doubts, marks, strict=True):
            changed[doubt.place] = doubt.replaced(changed[doubt.place], mark)
        rendered = ""
        marked: Sequence[tuple[int, int]] = ()
        # A template that looks at these parts may refuse the marks: then each is tried alone.
        with suppress(DataError):
            rendered, marked = self._render(changed, chat.tools)
        learnt = "".join(rendered[start:end] for start, end in marked)
        for doubt, mark in zip(doubts, marks, strict=True):
            if rendered.count(mark) >= (2 if doubt.is_content else 1):
                if marked and doubt.is_learnt and mark not in learnt:
                    self._refuse_unmarked(doubt)
                if doubt.is_content and not doubt.is_learnt:
                    self._note_change(doubt, chat, rendered.split(mark)[1])
                continue
            if doubt.is_reasoning and not doubt.is_learnt:
                self._notes[
                    "the chat template leaves the reasoning of turns that are not learnt out of "
                    "the text, as it does in use"
                ] = None
            elif not self._changes(doubt, mark, chat):
                raise DataError(doubt.message(is_last=doubt.place == last))

    def _note_change(self, doubt: _Doubt, chat: _Rendered, written: str) -> None:
        """Note a text that the template changes between its two ends."""
        content = str(chat.messages[doubt.place]["content"])
        is_assistant = doubt.role == "assistant"  # its reasoning may be left out, as in use
        if is_assistant or written.strip() in _text_forms(content):
            return
        # Once for each role: the texts of other rows would make notes without end.
        about = f"the chat template changes texts of {doubt.role} messages"
        if not any(note.startswith(about) for note in self._notes):
            self._notes[
                f"{about}, so the model sees others than the rows hold (first: {content!r:.80} is "
                f"written as {written.strip()!r:.80})"
            ] = None

    def _refuse_unmarked(self, doubt: _Doubt) -> None:
        """Tell of a part of a learnt turn that stands outside of what the template marks."""
        if not doubt.is_reasoning:
            raise DataError(
                f"the chat template writes {doubt.what} outside of its {{% generation %}} "
                "markers, so the turn would be learnt without it; expected all that the assistant "
                f"says between the markers: correct them, or {_OTHER_TEMPLATE}"
            )
        self._notes[
            f"the chat template writes {doubt.what!r} outside of its {{% generation %}} markers: "
            "it stands in the text and is not learnt"
        ] = None

    def _changes(self, doubt: _Doubt, mark: str, chat: _Rendered) -> bool:
        """Whether the rendering is another with a mark in place of the part.

        Tested at both ends, as templates may cut a text; an assistant's, not learnt here, at its
        end only: reasoning at its beginning may be left out.
        """
        message = chat.messages[doubt.place]
        changes = [doubt.replaced(message, mark)]
        if doubt.is_content:
            content = message["content"]
            changes = [{**message, "content": f"{content} {mark}end"}]
            if doubt.role != "assistant":
                changes.append({**message, "content": f"{mark} {content}"})
        before, after = chat.messages[: doubt.place], chat.messages[doubt.place + 1 :]
        return all(self._differs(chat, [*before, each, *after], chat.tools) for each in changes)

    def _try_key(self, place: int, key: str, chat: _Rendered) -> None:
        """Note, or refuse, a key of a message that the template does not write."""
        message = chat.messages[place]
        owner = f"{message['role']} messages"
        tries = self._tries.get((owner, key), 0)
        if tries < 0 or (tries >= _TRIES and key not in (*MEDIA_KEYS, *_TOOL_KEYS)):
            return
        without: list[Message] = list(chat.messages)
        without[place] = {name: value for name, value in message.items() if name != key}
        is_written = self._differs(chat, without, chat.tools)
        if key in MEDIA_KEYS and not is_written:
            raise DataError(
                f"a message has {key!r}, which the chat template does not write; expected text "
                "alone, since only texts are trained here: remove the key or the row"
            )
        if key in _TOOL_KEYS and not is_written:
            raise DataError(
                f"a message has {key!r}, which the chat template does not write, so calls would "
                "be learnt without the tools; expected them in a column of the row (tools), or "
                f"{_OTHER_TEMPLATE}"
            )
        self._note_key(owner, key, is_written)


@dataclass(frozen=True)
class _Doubt:
    """A part of a chat's message that is not surely in the text."""

    place: int  # the message's
    path: tuple[str | int, ...]  # keys and places that lead to the part
    role: str  # the message's
    what: str  # the part, as errors and notes name it
    is_learnt: bool  # whether the message is

    @property
    def is_content(self) -> bool:
        """Whether it is the message's text, which may also be cut."""
        return self.path == ("content",)

    @property
    def is_reasoning(self) -> bool:
        """Whether it is what an assistant thought before it spoke."""
        return self.path[0] in REASONING_KEYS

    def replaced(self, message: Message, mark: str) -> dict[str, Any]:
        """The message with a mark in place of the part.

        Reasoning is often held under several names, of which a template reads any.
        """
        if self.is_content:
            return {**message, "content": f"{mark} {message['content']} {mark}end"}
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


class _Said:
    """All that a chat says, to tell a part that is written from an equal one that is not."""

    def __init__(self, messages: Sequence[Message], tools: Any) -> None:
        self._messages = messages
        self._tools = tools

    @cached_property
    def text(self) -> str:
        """All texts of messages and tools."""
        texts = [_dumped(self._tools)]
        for message in self._messages:
            texts += [str(message["content"]), *_reasoning(message), *_strings(_calls(message))]
        return "\0".join(texts)

    @cached_property
    def calls(self) -> Counter[str]:
        """How often each call is made."""
        calls = [call for message in self._messages for call in _calls(message)]
        return Counter(_dumped(_core(each)) for each in calls)


def _doubts(
    place: int, message: Message, scope: str, said: _Said, *, is_learnt: bool
) -> Iterator[_Doubt]:
    """The parts of a message that are not surely in a text; equal parts must be there each."""
    role, content = str(message["role"]), str(message["content"]).strip()
    has_more = message.get("tool_calls") or any(message.get(key) for key in REASONING_KEYS)

    def is_surely_in(part: str) -> bool:
        return len(part) >= _TELLING and scope.count(part) >= max(said.text.count(part), 1)

    # The text of a learnt turn has been compared already; it may be part of a call.
    if content and not (is_learnt and not has_more) and not is_surely_in(content):
        what = f"a message of the role {role!r} as a whole"
        yield _Doubt(place, ("content",), role, what, is_learnt)
    for value, key in _reasoning(message).items():
        if not is_surely_in(value):
            yield _Doubt(place, (key,), role, key, is_learnt)
    for number, outer in enumerate(message.get("tool_calls") or ()):
        call = function_of(outer)
        path = ("tool_calls", number, *(() if call is outer else ("function",)))
        times = said.calls[_dumped(_core(call))]
        if call.get("arguments") and any(
            scope.count(written) >= times for written in _json_forms(_core(call))
        ):
            continue
        yield from _doubts_of_call(place, role, call, path, is_learnt)


def _doubts_of_call(
    place: int, role: str, call: Message, path: tuple[str | int, ...], is_learnt: bool
) -> Iterator[_Doubt]:
    name, arguments = call.get("name"), call.get("arguments")
    yield _Doubt(place, (*path, "name"), role, f"the call of {name!r}", is_learnt)
    if arguments is None:
        for key in sorted(set(call) - {"name", "id", "type", "index"}):
            what = f"the key {key!r} of the call of {name!r} (expected 'arguments')"
            yield _Doubt(place, (*path, key), role, what, is_learnt)
    if not arguments:
        return
    if not isinstance(arguments, Mapping):
        what = f"the arguments of the call of {name!r}"
        yield _Doubt(place, (*path, "arguments"), role, what, is_learnt)
        return
    for key in arguments:
        what = f"the argument {key!r} of the call of {name!r}"
        yield _Doubt(place, (*path, "arguments", key), role, what, is_learnt)


def _reasoning(message: Message) -> dict[str, str]:
    """Each text of reasoning, which may stand under several names, with the first of them."""
    found: dict[str, str] = {}
    for key in REASONING_KEYS:
        value = message.get(key)
        if isinstance(value, str) and value.strip():
            found.setdefault(value.strip(), key)
    return found


def _calls(message: Message) -> list[Message]:
    return [function_of(call) for call in message.get("tool_calls") or ()]


def _core(call: Message) -> dict[str, Any]:
    return {"name": call.get("name"), "arguments": call.get("arguments")}


def _swapped_results(messages: Sequence[Message]) -> Iterator[set[int]]:
    """Places of the results behind each turn whose order is not that of its calls."""
    ids: list[Any] = []
    places: dict[int, Any] = {}
    for place, message in enumerate([*messages, {"role": "end"}]):
        if message["role"] == "tool" and message.get("tool_call_id") in ids:
            places[place] = message["tool_call_id"]
            continue
        order = [ids.index(each) for each in places.values()]
        if order != sorted(order):
            yield set(places)
        places = {}
        ids = [call["id"] for call in message.get("tool_calls") or () if call.get("id")]


def _with_function(tool: Message, function: Message) -> Message:
    return {**tool, "function": function} if "function" in tool else function


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _strings(value: Any) -> Iterator[str]:
    """The texts inside of a value, as they stand where they are not written as JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(inner)


def _json_forms(value: Any) -> Iterable[str]:
    for ascii_only in (False, True):
        for separators in ((", ", ": "), (",", ":")):
            yield json.dumps(value, ensure_ascii=ascii_only, separators=separators, default=str)


def _text_forms(text: str) -> set[str]:
    """A text as it is, and as it stands inside of JSON, without spaces around it."""
    forms = [text, *(json.dumps(text, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))]
    return {each.strip() for each in forms}


def _replaced(value: Any, path: Sequence[str | int], mark: str) -> Any:
    if not path:
        return mark
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        return [_replaced(each, rest, mark) if i == step else each for i, each in enumerate(value)]
    return {**value, step: _replaced(value.get(step), rest, mark)}
