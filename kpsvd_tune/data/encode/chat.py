"""Render chats with the tokenizer's template and find the text the assistant wrote.

Two ways to find it. A template with generation markers says it itself. Any other is rendered up
to each assistant turn with the generation prompt, and again with the turn: what the second
rendering adds is what a model would have to write. Either way the result is checked against the
messages, so a template that drops, rewrites or reorders text is refused rather than mistrained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode.chat_program import (
    ChatProgram,
    TemplateError,
    TemplateMismatch,
    compile_template,
    variables_of,
    with_reasoning_names,
)
from kpsvd_tune.data.encode.format import Chat
from kpsvd_tune.data.encode.messages import REASONING_KEYS
from kpsvd_tune.data.encode.templates import Template, shipped_name, texts_of
from kpsvd_tune.data.encode.tools import render_calls
from kpsvd_tune.data.encode.written import WrittenCheck
from kpsvd_tune.data.read.files import shortened
from kpsvd_tune.errors import DataError

Messages = Sequence[Mapping[str, Any]]
# Chats with more answers than this are not rendered anew up to each of them, see `_near`.
_RENDERED_EACH = 24
# At most so many messages around a turn are rendered in place of all before it.
_NEAR = 12
_THINK_END = "</think>"
_OTHER_TEMPLATE = (
    "another template (dataset.chat_template: the name of one that comes with kpsvd-tune, or a "
    "file)"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text that is learnt or not."""

    text: str
    is_trained: bool


class ChatRenderer:
    """The chat template of one tokenizer, whose special tokens are given as texts.

    Another template may be given to compare with; it must ask as this one does, wherever it asks.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        special_tokens: Sequence[str],
        compared_with: Template | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, and the chat format (or template: chat) "
                "needs one; use a chat model, name a template with dataset.chat_template, or "
                "write dataset.template as text with {prompt} and {completion}"
            )
        self._template: Template = tokenizer.chat_template
        self._compared_with = compared_with
        # Templates of this package must mark exactly the answer; other authors may choose.
        self.is_strict = any(map(shipped_name, texts_of(self._template)))
        self._special_tokens = tuple(special_tokens)
        # Read once: a tokenizer makes this anew at every call.
        self._special_token_names = dict(tokenizer.special_tokens_map)
        # What a user should know.
        self.notes: dict[str, None] = {}  # a set that keeps its order
        self._written = WrittenCheck(self.render, self.notes)

    def prompt(self, messages: Messages, tools: Any = None) -> str:
        """The text that a model continues with its answer: messages and generation prompt."""
        asked = self.render(messages, tools, add_generation_prompt=True)[0]
        if self._compared_with is not None:
            try:
                other = self.render(messages, tools, True, self._compared_with)[0]
            except TemplateError:
                return asked  # it refuses these messages, so it cannot ask in another way
            if other != asked:
                raise TemplateMismatch(
                    f"it asks with {_from_fork(other, asked)} where the tokenizer's own asks with "
                    f"{_from_fork(asked, other)}"
                )
        return asked

    def segments(self, chat: Chat, *, only_last: bool = False) -> list[Segment]:
        """Split the rendered chat into learnt and other text, up to its last learnt turn.

        Learnt are the chat's `learnt` turns, or only the last, each with the token that ends it.
        """
        answers = chat.learnt[-1:] if only_last else chat.learnt
        messages = chat.messages[: answers[-1] + 1]
        text, marked = self.render(messages, chat.tools)
        if self._program(chat.tools).has_markers:
            by_place = _by_place(messages, marked)
            spans = _MarkedFinder(self, messages, chat.tools, text, by_place).spans(answers)
        else:
            spans = _Finder(self, messages, chat.tools, text, {}).spans(answers)
        turns = {place: text[start:end] for place, (start, end) in zip(answers, spans, strict=True)}
        self._written.check(messages, chat.tools, turns, text)
        segments: list[Segment] = []
        position = 0
        for start, end in spans:
            segments += [Segment(text[position:start], False), Segment(text[start:end], True)]
            position = end
        last = segments[-1]
        if self.ends_turn(last.text) and not self.ends_answer(last.text, messages[-1]):
            # The answer itself ends with the text of a special token, which does not end the turn.
            segments[-1] = replace(last, text=last.text + self._special_token_names["eos_token"])
        return [segment for segment in segments if segment.text]

    @cached_property
    def arguments(self) -> str:
        """Advice about the template's arguments for reasoning; empty where it has none."""
        found = set().union(*map(variables_of, texts_of(self._template)))
        known = sorted(name for name in found if "think" in name or "reasoning" in name)
        if not known:
            return ""
        return (
            f"give it another value of {' or '.join(known)} (dataset.template_arguments, such as "
            f"{{{known[0]}: false}}), or "
        )

    def ends_turn(self, text: str) -> bool:
        """Whether a turn's text ends with a special token."""
        return text.endswith(self._special_tokens)

    def ends_answer(self, turn: str, message: Mapping[str, Any]) -> bool:
        """Whether a special token ends a turn, other than one that its text ends with."""
        said = message["content"].strip()
        if not self.ends_turn(said):
            return self.ends_turn(turn)
        _, found, rest = turn.partition(said)
        return self.ends_turn(rest if found else turn)

    def turn(self, text: str, message: Mapping[str, Any]) -> str:
        """The turn without the line break that templates write after its end token."""
        stripped = text.rstrip()
        return stripped if self.ends_answer(stripped, message) else text

    def end_after(self, text: str) -> str:
        """The end token right behind a marked stretch that left it out."""
        for token in self._special_tokens:
            if text.startswith(token):
                self.notes[
                    f"the chat template's markers leave out the end token {token!r}: it is "
                    "trained all the same, or the model would never stop"
                ] = None
                return token
        return ""

    def check_turn(self, message: Mapping[str, Any], turn: str, is_last: bool) -> None:
        """Check that a turn is the assistant's text, and note what the template does to it."""
        start, end = _place_of(message["content"], turn)
        if not is_last and not self.ends_answer(turn, message):
            self.notes[
                "the chat template ends assistant turns without an end token: only the last turn "
                "of a chat, behind which one is put, teaches the model to stop; use a template "
                "that writes one behind every turn"
            ] = None
        before, after = turn[:start].strip(), turn[end:].strip()
        for token in self._special_tokens:
            after = after.removesuffix(token).strip()
        says_more = any(message.get(key) for key in ("tool_calls", *REASONING_KEYS))
        if (before or after) and not says_more:
            self.notes[
                "the chat template adds text of its own to assistant turns, which is trained as "
                f"well: {head(before or after)}"
            ] = None

    def check_alike(self, messages: Messages, tools: Any, turn: str) -> None:
        """Check that the compared template, where it is consistent, writes the last turn alike."""
        if self._compared_with is None:
            return
        try:
            asked, _ = self.render(messages[:-1], tools, True, self._compared_with)
            written, _ = self.render(messages, tools, False, self._compared_with)
        except TemplateError:
            return
        if written.startswith(asked) and not written.startswith(turn, len(asked)):
            raise TemplateMismatch(
                f"it writes {head(turn)} where the tokenizer's own writes "
                f"{head(written[len(asked) :])}"
            )

    def _program(self, tools: Any, template: Template | None = None) -> ChatProgram:
        template = template or self._template
        if isinstance(template, dict):
            # As transformers chooses among several.
            name = "tool_use" if tools and "tool_use" in template else "default"
            if name not in template:
                raise TemplateError(
                    f"the tokenizer has the chat templates {', '.join(template)} and none is the "
                    "default; name a file with dataset.chat_template"
                )
            template = template[name]
        return compile_template(template)

    def render(
        self,
        messages: Messages,
        tools: Any,
        add_generation_prompt: bool = False,
        template: Template | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and its marked stretches; TemplateError if the template refuses."""
        try:
            program = self._program(tools, template)
            found = render_calls(
                lambda given: program.render(
                    messages=given,
                    tools=list(tools) if tools else None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_token_names,
                ),
                with_reasoning_names(messages),
            )
        # A template is a program of its own: besides jinja's errors, its expressions raise these.
        except (
            *(jinja2.TemplateError, TypeError, ValueError, LookupError, TimeoutError),
            *(ArithmeticError, AttributeError, RuntimeError, MemoryError),
        ) as error:
            reason = str(error) or type(error).__name__
            raise TemplateError(
                f"the tokenizer's chat template refuses these messages: {reason}; check their "
                f"roles and order, or use {_OTHER_TEMPLATE}"
            ) from error
        if program.reads_date:
            self.notes[
                "the chat template writes today's date into every row: the model learns that date, "
                "and rows tokenised on another day differ; where the template takes the date as "
                "an argument, give it one (dataset.template_arguments), else use another template"
            ] = None
        return found


@dataclass(frozen=True)
class _Finder:
    """Finds the answers of one chat, which ends with an answer, in the text it was rendered to."""

    _renderer: ChatRenderer
    _messages: Messages
    _tools: Any
    _text: str
    _marked: Mapping[int, tuple[int, int]]  # stretch of each assistant turn, where they are marked

    def spans(self, answers: Sequence[int]) -> list[tuple[int, int]]:
        """Start and end in the text of each answer, which are given by place, ascending."""
        spans: list[tuple[int, int]] = []
        for number, index in enumerate(answers):
            found = None
            if spans and not _is_rendered_whole(number, len(answers)):
                found = self._near(answers[number - 1], index, spans[-1][1])
            start, end = found or self._whole(index)
            turn = self._text[start:end]
            if found is None:
                self._renderer.check_alike(self._messages[: index + 1], self._tools, turn)
            is_last = index == len(self._messages) - 1
            self._renderer.check_turn(self._messages[index], turn, is_last)
            spans.append((start, end))
        return spans

    def _whole(self, index: int) -> tuple[int, int]:
        """Find an answer by rendering everything before it."""
        before = self._renderer.prompt(self._messages[:index], self._tools)
        is_last = index == len(self._messages) - 1
        whole = self._messages[: index + 1]
        after = self._text if is_last else self._renderer.render(whole, self._tools)[0]
        if not after.startswith(before):
            raise _asks_otherwise(before, after, self._renderer.arguments)
        turn = self._renderer.turn(after[len(before) :], self._messages[index])
        end = len(before) + len(turn)
        if not self._text.startswith(after[:end]):
            raise _rewrites(self._renderer.arguments)
        return len(before), end

    def _near(self, previous: int, index: int, position: int) -> tuple[int, int] | None:
        """Find an answer of a long chat by rendering only the messages near it, which is faster.

        The text after `previous`, which ends at `position`, is taken from a short chat around both
        and must stand there in the long one; None where it does not, and then all must be rendered.
        """
        near = self._around(previous, index)
        if near is None:
            return None
        past, asked = near[: len(near) - (index - previous)], near[:-1]
        renderer = self._renderer
        try:
            shorter = renderer.turn(renderer.render(past, self._tools)[0], past[-1])
            before = renderer.prompt(asked, self._tools)
            after, _ = renderer.render(near, self._tools)
        except TemplateError:
            return None
        if not (before.startswith(shorter) and after.startswith(before)):
            return None
        start = position + len(before) - len(shorter)
        turn = renderer.turn(after[len(before) :], near[-1])
        if self._text[position : start + len(turn)] != after[len(shorter) : len(before)] + turn:
            return None
        return start, start + len(turn)

    def _around(self, previous: int, index: int) -> Messages | None:
        """A short chat that ends as the long one does at an answer; None where there is none."""
        messages = self._messages
        users = [i for i in range(max(0, previous - _NEAR), previous) if _is(messages[i], "user")]
        if users:
            near = messages[users[-1] : index + 1]
        else:  # calls of tools one after the other: the question and the latest of them
            first = next((i for i, m in enumerate(messages) if _is(m, "user")), previous)
            if first >= previous:
                return None
            near = [*messages[: first + 1], *messages[previous : index + 1]]
        return near if len(near) <= 2 * _NEAR else None


class _MarkedFinder(_Finder):
    """Finds the answers of a chat whose template marks them, one stretch for each turn."""

    def _whole(self, index: int) -> tuple[int, int]:
        text, renderer = self._text, self._renderer
        before = renderer.prompt(self._messages[:index], self._tools)
        message = self._messages[index]
        is_asked = text.startswith(before)
        start, end = self._cut(text, self._marked[index], message, len(before), is_asked)
        is_last = index == len(self._messages) - 1
        if text[:start] != before and renderer.is_strict:
            if is_last:
                raise _asks_otherwise(before, text, renderer.arguments)
            raise _rewrites(renderer.arguments)
        if text[:start] != before:
            renderer.notes[
                "the chat template's generation prompt is not the text before the tokens it "
                f"marks for training: it asks with {tail(before)}, the marked text follows "
                f"{tail(text[:start])}"
            ] = None
        if not is_last:
            # The turn is learnt as the long chat has it: it must be the same where it is last.
            alone, marked = renderer.render(self._messages[: index + 1], self._tools)
            is_asked = alone.startswith(before)
            place = self._cut(alone, marked[-1], message, len(before), is_asked)
            if place != (start, end) or alone[:end] != text[:end]:
                raise _rewrites(renderer.arguments)
        return start, end

    def _near(self, previous: int, index: int, position: int) -> tuple[int, int] | None:
        found = super()._near(previous, index, position)
        if found is None:
            return None
        message = self._messages[index]
        start, end = self._cut(self._text, self._marked[index], message, found[0], True)
        return (start, end) if end == found[1] else None

    def _cut(
        self,
        text: str,
        marked: tuple[int, int],
        message: Mapping[str, Any],
        asked: int,
        is_asked: bool,
    ) -> tuple[int, int]:
        """The marked stretch without the header that a model never writes, and with its end."""
        start, end = marked
        # Markers around the whole turn hold its header too.
        if is_asked and start < asked <= end:
            start = asked
        turn = self._renderer.turn(text[start:end], message)
        if not self._renderer.ends_answer(turn, message):
            turn += self._renderer.end_after(text[start + len(turn) :])
        return start, start + len(turn)


def head(text: str) -> str:
    """The beginning of a text, as messages show it."""
    return repr(shortened(text, 50))


def tail(text: str) -> str:
    """The end of a text, as messages show it."""
    return repr(text if len(text) <= 50 else "..." + text[-47:])


def _is(message: Mapping[str, Any], role: str) -> bool:
    return bool(message["role"] == role)


def _by_place(messages: Messages, marked: Sequence[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """The marked stretch of each assistant turn."""
    turns = [i for i, message in enumerate(messages) if _is(message, "assistant")]
    if len(marked) != len(turns):
        raise TemplateError(
            f"the chat template marks {len(marked)} stretches with {{% generation %}} for "
            f"{len(turns)} assistant turns; expected one each: correct the template's markers"
        )
    return dict(zip(turns, marked, strict=True))


def _is_rendered_whole(number: int, count: int) -> bool:
    """Whether all before an answer is rendered: in long chats the first, the last and some."""
    return (
        count <= _RENDERED_EACH
        or number < 4
        or number >= count - 4
        or number & (number - 1) == 0  # a power of two: few, and all over the chat
    )


def _place_of(content: str, turn: str) -> tuple[int, int]:
    """Where an assistant's text stands in its turn; reasoning written into it may be set apart."""
    text = content.strip()
    if (start := turn.find(text)) >= 0:
        return start, start + len(text)
    reasoning, marker, answer = text.rpartition(_THINK_END)
    if not marker or _only_mentions_thinking(reasoning, answer):
        raise TemplateError(
            "the chat template does not write the assistant's text as it is: expected "
            f"{head(text)}, it wrote {head(turn)}; use {_OTHER_TEMPLATE} that keeps it"
        )
    # Templates that know reasoning take it out and write it in their own place.
    reasoning, answer = reasoning.strip().removeprefix("<think>").strip(), answer.strip()
    start = turn.find(reasoning)
    place = turn.find(answer, max(start, 0) + len(reasoning))
    if start < 0 or place < 0:
        raise TemplateError(
            "the chat template drops or changes the assistant's reasoning: expected "
            f"{head(text)}, it wrote {head(turn)}; take the reasoning out of the rows to train "
            f"answers alone (the key reasoning_content, or the text up to {_THINK_END}), or use "
            f"{_OTHER_TEMPLATE} that keeps it, such as qwen3, deepseek-r1 or chatml"
        )
    start = start if reasoning else place
    marker_place = turn.rfind("<think>", 0, start)
    return (start if marker_place < 0 else marker_place), place + len(answer)


def _only_mentions_thinking(reasoning: str, answer: str) -> bool:
    """Whether a text only mentions the markers of reasoning, in the middle of a line."""
    if not reasoning or reasoning.startswith("<think>"):
        return False
    is_inline = not (reasoning.endswith("\n") or answer.startswith("\n"))
    return "<think>" in reasoning + answer or (bool(answer) and is_inline)


def _asks_otherwise(before: str, after: str, arguments: str) -> TemplateError:
    return TemplateError(
        "the chat template's generation prompt is not how it starts an assistant turn: it asks "
        f"with {tail(before)} and writes {_from_fork(before, after)}; training and generation "
        f"would differ: {arguments}use {_OTHER_TEMPLATE} where they agree"
    )


def _rewrites(arguments: str) -> TemplateError:
    return TemplateError(
        "the chat template changes earlier turns when later ones follow (as templates do that "
        "drop past reasoning), so not every assistant turn can be learnt from one rendering: "
        "train each turn as a row of its own, behind what a model sees before it (dataset.learn: "
        f"each), or the last turn only (dataset.learn: last), or {arguments}use {_OTHER_TEMPLATE} "
        "that keeps earlier turns"
    )


def _from_fork(left: str, right: str) -> str:
    """The second text from a little before the place where the two part."""
    pairs = enumerate(zip(left, right, strict=False))
    fork = next((place for place, (a, b) in pairs if a != b), len(right))
    return head(right[max(0, fork - 20) :])
