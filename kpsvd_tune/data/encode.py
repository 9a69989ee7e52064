"""Turn examples into token ids and labels: only what the model has to write is learnt.

A row is a list of text segments, learnt or not. Each segment is tokenised on its own and the ids
are joined, so the ids of a prompt are the same whether an answer follows in training or is asked
for in generation; no token straddles the boundary.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.chat import ChatRenderer, Segment
from kpsvd_tune.data.format import Chat, Pair
from kpsvd_tune.data.template import TextTemplate
from kpsvd_tune.errors import DataError

IGNORED = -100  # the label that torch's cross entropy skips


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One row as the model sees it.

    Attributes:
        input_ids: Token ids.
        labels: The same ids where a token is learnt, `IGNORED` elsewhere; never at the first
            position, which nothing predicts.
        row: Number of the row in its source.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    row: int

    @property
    def num_supervised(self) -> int:
        """Tokens that the loss counts."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row, or None where nothing learnt is left in it, and what happened on the way."""

    row: TokenizedRow | None
    is_truncated: bool
    is_exact: bool
    holds_special_tokens: bool


class Encoder:
    """Encodes rows for training and prompts for generation with one template.

    Text templates: the prompt is everything before the completion. Spaces at its end move to the
    completion, since most tokenizers write " word" as one token and a prompt that ends in a
    space asks for something never seen. The end token follows the completion.

    Args:
        tokenizer: Any tokenizer of transformers.
        template: Text with {prompt} and {completion}, or "chat".
        max_length: Tokens a row is cut to.

    Raises:
        DataError: The template does not work with this tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._notes: dict[str, None] = {}
        self._special_ids = _special_tokens(tokenizer)
        self._special_pattern = re.compile("|".join(map(re.escape, self._special_ids)) or r"(?!)")
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token (eos_token), so the model could not learn to "
                "stop; set eos_token in the tokenizer's tokenizer_config.json"
            )
        self._template = None if template == "chat" else TextTemplate(template)
        self._chat = (
            ChatRenderer(tokenizer, tuple(self._special_ids)) if template == "chat" else None
        )
        self._start_ids = self._find_start_ids()
        # SentencePiece tokenizers put a space before whatever they are given. Inside a row that
        # space would be wrong, so a segment is then read behind a newline, which is cut off.
        self._newline_ids = self._ids("\n")
        self._adds_space = self._ids("\na")[len(self._newline_ids) :] != self._ids("a")

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about tokenizer and template, as met so far."""
        of_chat = self._chat.notes if self._chat else {}
        return (*self._notes, *of_chat)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's end token, and the chat template's if another."""
        ends = {int(self._tokenizer.eos_token_id): None}
        if self._chat is not None:
            question = {"role": "user", "content": "a"}
            answer = {"role": "assistant", "content": "b"}
            turn = self._chat.segments(Chat((question, answer)))[-1].text
            if self._chat.ends_turn(turn):
                ends[self._ids(turn)[-1]] = None
        return tuple(ends)

    def encode(self, example: Pair | Chat, row: int) -> EncodedRow:
        """Encode one example; its ids are cut at the maximal length.

        Args:
            example: What `RowFormat.example` read.
            row: Number to keep in the result.

        Raises:
            DataError: The chat template does not give the messages back.
        """
        segments, prefix, texts = self._segments(example)
        ids: list[int] = list(prefix)
        labels: list[int] = [IGNORED] * len(ids)
        is_exact = True
        for index, segment in enumerate(segments):
            piece = self._ids(segment.text) if index == 0 else self._inner_ids(segment.text)
            ids += piece
            labels += piece if segment.is_trained else [IGNORED] * len(piece)
            is_exact = is_exact and (
                not segment.is_trained or self._gives_back(piece, segment.text)
            )
        if not self._is_ended(example, ids):
            ids.append(int(self._tokenizer.eos_token_id))
            labels.append(ids[-1])
        labels[0] = IGNORED
        kept = TokenizedRow(tuple(ids[: self._max_length]), tuple(labels[: self._max_length]), row)
        return EncodedRow(
            row=kept if kept.num_supervised else None,
            is_truncated=len(ids) > self._max_length,
            is_exact=is_exact,
            holds_special_tokens=any(self._special_pattern.search(text) for text in texts),
        )

    def encode_prompt(
        self, prompt: str | Sequence[Mapping[str, Any]], system: str | None = None
    ) -> list[int]:
        """The ids that stand before the answer in training, for generation to continue.

        Args:
            prompt: What the prompt column holds, or chat messages up to a user's.
            system: System prompt, where the rows have one.
        """
        if isinstance(prompt, str):
            segments, prefix, _ = self._segments(Pair(prompt, "", system), is_prompt=True)
        else:
            segments, prefix = self._chat_prompt(tuple(prompt)), []
        ids = list(prefix)
        for index, segment in enumerate(segments):
            ids += self._ids(segment.text) if index == 0 else self._inner_ids(segment.text)
        return ids

    def pieces(self, row: TokenizedRow) -> tuple[tuple[str, bool], ...]:
        """The row as decoded from its ids: stretches of text, each learnt or not."""
        marked = zip(row.input_ids, row.labels, strict=True)
        groups = itertools.groupby(marked, key=lambda pair: pair[1] != IGNORED)
        return tuple(
            (self.decode([token for token, _ in group]), is_trained) for is_trained, group in groups
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids with special tokens written out and no spaces tidied away."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _segments(
        self, example: Pair | Chat, is_prompt: bool = False
    ) -> tuple[list[Segment], list[int], list[str]]:
        """Segments, the ids before them, and the texts of the row itself."""
        if isinstance(example, Pair) and self._template is not None:
            prompt, completion = self._template.render(example)
            segments = [Segment(prompt, False)]
            if not is_prompt:
                segments.append(Segment(completion, True))
            texts = [example.prompt, example.completion, example.system or ""]
            segments = [segment for segment in segments if segment.text]
            return segments, self._prefix(segments), texts
        if isinstance(example, Pair):
            system = {"role": "system", "content": example.system}
            messages = [system] if example.system else []
            messages.append({"role": "user", "content": example.prompt})
            if is_prompt:
                return self._chat_prompt(tuple(messages)), [], []
            messages.append({"role": "assistant", "content": example.completion})
            example = Chat(tuple(messages))
        # The template writes its own special tokens, so the tokenizer adds none.
        segments = self._renderer().segments(example)
        return segments, [], [str(message["content"]) for message in example.messages]

    def _chat_prompt(self, messages: tuple[Mapping[str, Any], ...]) -> list[Segment]:
        text = self._renderer().prompt(messages)
        past = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not past:
            return [Segment(text, False)]
        # Earlier answers are cut as they were in training, so that the ids are the same.
        segments = self._renderer().segments(Chat(messages[: past[-1] + 1]))
        length = sum(len(segment.text) for segment in segments)
        return [*segments, Segment(text[length:], False)]

    def _is_ended(self, example: Pair | Chat, ids: Sequence[int]) -> bool:
        """Whether the ids end as an answer must; a chat template may have an end of its own."""
        if isinstance(example, Pair) and self._template is not None:
            return bool(ids[-1] == self._tokenizer.eos_token_id)
        return ids[-1] in self._special_ids.values()

    def _renderer(self) -> ChatRenderer:
        if self._chat is None:
            raise DataError(
                "chat messages need the tokenizer's chat template; set dataset.template to chat"
            )
        return self._chat

    def _prefix(self, segments: list[Segment]) -> list[int]:
        """The ids that the tokenizer puts first, unless the template wrote them already."""
        first = segments[0].text if segments else ""
        bos = self._tokenizer.bos_token
        if not (self._start_ids and bos and first.startswith(bos)):
            return self._start_ids
        self._notes[
            f"dataset.template starts with {bos!r}, which the tokenizer adds by itself: it is "
            "written once; remove it from the template"
        ] = None
        return []

    def _find_start_ids(self) -> list[int]:
        """What the tokenizer puts before a text; what it may put behind is not taken."""
        plain = self._ids("a")
        full = list(self._tokenizer("a", add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        return []

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _inner_ids(self, text: str) -> list[int]:
        if self._adds_space:
            ids = self._ids("\n" + text)
            if ids[: len(self._newline_ids)] == self._newline_ids:
                return ids[len(self._newline_ids) :]
        return self._ids(text)

    def _gives_back(self, ids: Sequence[int], text: str) -> bool:
        decoded = self.decode(ids)
        # Such tokenizers drop the first space again when they decode.
        return decoded == text or (self._adds_space and decoded.lstrip() == text.lstrip())


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text and id of every special token; longest first, so that a search takes the whole one."""
    tokens = {str(t): int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    tokens |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return dict(sorted(tokens.items(), key=lambda item: -len(item[0])))
