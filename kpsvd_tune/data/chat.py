"""Render chats with the tokenizer's template and find the text the assistant wrote.

Two ways to find it. A template with generation markers says it itself. Any other is rendered up
to each assistant turn with the generation prompt, and again with the turn: what the second
rendering adds is what a model would have to write. Either way the result is checked against the
messages, so a template that drops, rewrites or reorders text is refused rather than mistrained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from kpsvd_tune.data.format import Chat
from kpsvd_tune.data.tokenized import Segment
from kpsvd_tune.data.written import REASONING_KEYS, WrittenCheck
from kpsvd_tune.errors import DataError

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """The chat template of one tokenizer.

    Attributes:
        notes: What a user should know about the template, collected while rendering.

    Args:
        tokenizer: Tokenizer with a chat template.
        special_tokens: Texts of its special tokens.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: Sequence[str]) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, and the chat format (or template: chat) "
                "needs one; use a chat model, or write dataset.template as text with {prompt} "
                "and {completion}"
            )
        self._tokenizer = tokenizer
        self._special_tokens = tuple(special_tokens)
        self.notes: dict[str, None] = {}  # a set that keeps its order
        self._written = WrittenCheck(self._render, self.notes)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
        """The text that a model continues with its answer: messages and generation prompt."""
        return self._render(messages, tools, add_generation_prompt=True)

    def segments(self, chat: Chat, *, only_last: bool = False) -> list[Segment]:
        """Split the rendered chat into learnt and other text.

        The turns that the chat gives to learn are, or the last of them only, each with the special
        token that ends it. What follows the last one is left out.

        Raises:
            DataError: The template refuses the messages, or its text is not that of the messages.
        """
        learnt = chat.learnt[-1:] if only_last else chat.learnt
        messages = chat.messages[: learnt[-1] + 1]
        template = self._tokenizer.get_chat_template(None, _listed(chat.tools))
        if _MARKER.search(template):
            text, spans = self._marked_spans(messages, chat.tools, learnt, template)
        else:
            text, spans = self._rendered_spans(messages, chat.tools, learnt)
        turns = {place: text[start:end] for place, (start, end) in zip(learnt, spans, strict=True)}
        self._written.check(messages, chat.tools, turns, text)
        segments: list[Segment] = []
        position = 0
        for start, end in spans:
            segments += [Segment(text[position:start], False), Segment(text[start:end], True)]
            position = end
        return [segment for segment in segments if segment.text]

    def ends_turn(self, text: str) -> bool:
        """Whether a turn's text ends with a special token."""
        return text.endswith(self._special_tokens)

    def _rendered_spans(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, learnt: Sequence[int]
    ) -> tuple[str, list[tuple[int, int]]]:
        text = self._render(messages, tools)
        spans = []
        for index in learnt:
            is_last = index == len(messages) - 1
            before = self.prompt(messages[:index], tools)
            after = text if is_last else self._render(messages[: index + 1], tools)
            if not after.startswith(before):
                raise DataError(
                    "the chat template's generation prompt is not how it starts an assistant "
                    f"turn: it asks with {_tail(before)} and writes {_from_fork(before, after)}; "
                    "training and generation would differ: use a template where they agree, "
                    "or one with {% generation %} markers"
                )
            end = len(before) + len(self._turn(after[len(before) :]))
            if not text.startswith(after[:end]):
                raise DataError(
                    "the chat template changes earlier turns when later ones follow (as "
                    "templates do that drop past reasoning), so not every assistant turn can be "
                    "learnt from one rendering: use a template that keeps them, or one with "
                    "{% generation %} markers, or learn the last turn only (dataset.learn: last)"
                )
            spans.append((len(before), end))
            self._check_turn(messages[index], text[len(before) : end], is_last)
        return text, spans

    def _marked_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        learnt: Sequence[int],
        template: str,
    ) -> tuple[str, list[tuple[int, int]]]:
        rendered, marked = self._call(
            render_jinja_template,
            conversations=[list(messages)],
            tools=_listed(tools),
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **self._tokenizer.special_tokens_map,
        )
        text: str = rendered[0]
        turns = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
        if len(marked[0]) != len(turns):
            raise DataError(
                f"the chat template marks {len(marked[0])} stretches with {{% generation %}} for "
                f"{len(turns)} assistant turns; expected one each: correct the template's markers"
            )
        spans = []
        for index, (start, end) in zip(turns, marked[0], strict=True):
            if index not in learnt:
                continue
            before = self.prompt(messages[:index], tools)
            # Markers around the whole turn hold its header too, which the model never writes.
            if text.startswith(before) and start < len(before) <= end:
                start = len(before)
            if text[:start] != before:
                self.notes[
                    "the chat template's generation prompt is not the text before the tokens it "
                    f"marks for training: it asks with {_tail(before)}, the marked text follows "
                    f"{_tail(text[:start])}"
                ] = None
            turn = self._turn(text[start:end])
            if not self.ends_turn(turn):
                turn += self._end_after(text[start + len(turn) :])
            spans.append((start, start + len(turn)))
            self._check_turn(messages[index], turn, index == turns[-1])
        return text, spans

    def _turn(self, text: str) -> str:
        """The turn without the line break that templates write after its end token."""
        stripped = text.rstrip()
        return stripped if self.ends_turn(stripped) else text

    def _end_after(self, text: str) -> str:
        """The end token right behind a marked stretch that left it out."""
        for token in self._special_tokens:
            if text.startswith(token):
                self.notes[
                    f"the chat template's markers leave out the end token {token!r}: it is "
                    "trained all the same, or the model would never stop"
                ] = None
                return token
        return ""

    def _check_turn(self, message: Mapping[str, Any], turn: str, is_last: bool) -> None:
        content = message["content"].strip()
        start = turn.find(content)
        if start < 0 and not _keeps_reasoning(content, turn):
            what, cure = "", "use a template that keeps it"
            if "</think>" in content:
                what = ", it takes the reasoning out or changes it"
                cure = (
                    "name a template that keeps it with dataset.chat_template: FILE (or set "
                    "dataset.learn to each or last, where it changes earlier turns only), or "
                    "take <think>...</think> out of the rows"
                )
            raise DataError(
                f"the chat template does not write the assistant's text as it is{what}: expected "
                f"{_head(content)}, it wrote {_head(turn)}; {cure}"
            )
        if not is_last and not self.ends_turn(turn):
            self.notes[
                "the chat template ends assistant turns without an end token: only the last turn "
                "of a chat, behind which one is put, teaches the model to stop; use a template "
                "that writes one behind every turn"
            ] = None
        if start < 0:
            self.notes[
                "the chat template changes spaces and line breaks around <think>...</think>; what "
                "is learnt is what it writes"
            ] = None
            return
        before, after = turn[:start].strip(), turn[start + len(content) :].strip()
        for token in self._special_tokens:
            after = after.removesuffix(token).strip()
        says_more = any(message.get(key) for key in ("tool_calls", *REASONING_KEYS))
        if (before or after) and not says_more:
            self.notes[
                "the chat template adds text of its own to assistant turns, which is trained as "
                f"well: {_head(before or after)}"
            ] = None

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, add_generation_prompt: bool = False
    ) -> str:
        text: str = self._call(
            self._tokenizer.apply_chat_template,
            [dict(message) for message in messages],
            tools=_listed(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    @staticmethod
    def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        # A template is a program of its own: besides jinja's errors, its expressions raise these.
        except (
            *(jinja2.TemplateError, TypeError, ValueError, LookupError),
            *(ArithmeticError, AttributeError, RuntimeError),
        ) as error:
            raise DataError(
                f"the tokenizer's chat template refuses these messages: {error}; check their "
                "roles and order"
            ) from error


def _keeps_reasoning(content: str, turn: str) -> bool:
    """Whether reasoning and answer are in the turn, in order, up to the spaces around them."""
    if "</think>" not in content:
        return False
    position = 0
    for piece in re.split(r"(</?think>)", content):
        position = turn.find(piece.strip(), position)
        if position < 0:
            return False
        position += len(piece.strip())
    return True


def _listed(tools: Any) -> list[Any] | None:
    return list(tools) if tools else None


def _head(text: str) -> str:
    return repr(text if len(text) <= 50 else text[:47] + "...")


def _tail(text: str) -> str:
    return repr(text if len(text) <= 50 else "..." + text[-47:])


def _from_fork(left: str, right: str) -> str:
    """The second text from a little before the place where the two part."""
    pairs = enumerate(zip(left, right, strict=False))
    fork = next((place for place, (a, b) in pairs if a != b), len(right))
    return _head(right[max(0, fork - 20) :])
