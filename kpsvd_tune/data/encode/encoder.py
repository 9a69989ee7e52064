"""Turn examples into token ids and labels: only what the model has to write is learnt.

A row is a list of text segments, learnt or not. Each segment is tokenised on its own and the ids
are joined, so the ids of a prompt are the same whether an answer follows in training or is asked
for in generation; no token straddles the boundary.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kpsvd_tune.data.encode.chat import ChatRenderer, Segment
from kpsvd_tune.data.encode.format import Chat, Pair, is_answer
from kpsvd_tune.data.encode.templates import Template, TextTemplate
from kpsvd_tune.errors import DataError

IGNORED = -100  # the label that torch's cross entropy skips
_PLAIN = TextTemplate("{completion}")
# Which assistant turns of a chat are learnt: all in one row, the last one, or each in its own row.
Learn = Literal["all", "last", "each"]


class Mark(IntFlag):
    """What is out of the ordinary with a row; stores keep these bits."""

    EMPTY = 1  # nothing to learn in it
    FULL_PROMPT = 2  # nothing to learn within the maximal length
    CUT = 4  # longer than the maximal length
    SPECIAL = 8  # its text holds the text of a special token
    INEXACT = 16  # the tokenizer does not give its text back
    FAULTY = 32  # cannot be read or laid out, and is left out


NO_MARK = Mark(0)
UNUSABLE = Mark.EMPTY | Mark.FULL_PROMPT | Mark.FAULTY


class TokenizedRow:
    """One row as the model sees it: arrays, or slices of the arrays of a store."""

    __slots__ = ("input_ids", "labels", "marks", "row")

    def __init__(
        self, input_ids: ArrayLike, labels: ArrayLike, row: int, marks: Mark = NO_MARK
    ) -> None:
        # (tokens,) token ids; none where the row cannot be used
        self.input_ids: NDArray[np.int32] = np.asarray(input_ids, dtype=np.int32)
        # (tokens,) the same ids where a token is learnt, `IGNORED` elsewhere; never learnt at the
        # first position, which nothing predicts
        self.labels: NDArray[np.int32] = np.asarray(labels, dtype=np.int32)
        self.row = row  # its number in the source
        self.marks = marks

    def __len__(self) -> int:
        return len(self.input_ids)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TokenizedRow)
            and (self.row, self.marks) == (other.row, other.marks)
            and np.array_equal(self.input_ids, other.input_ids)
            and np.array_equal(self.labels, other.labels)
        )

    def __repr__(self) -> str:
        ids, labels = self.input_ids.tolist(), self.labels.tolist()
        return f"TokenizedRow({ids}, {labels}, {self.row}, {self.marks!r})"

    @property
    def num_supervised(self) -> int:
        """Tokens that the loss counts."""
        return int(np.count_nonzero(self.labels != IGNORED))


@dataclass(frozen=True, slots=True)
class Layout:
    """A row as text, learnt or not."""

    segments: Sequence[Segment]
    prefix: Sequence[int]  # ids that stand before them
    holds_special_tokens: bool  # whether the row's own text holds the text of a special token
    is_chat: bool  # whether a chat template wrote it, which may have an end token of its own


class Encoder:
    """Encodes rows for training and prompts for generation with one template.

    Text templates: the prompt is everything before the completion. Spaces at its end move to the
    completion, since most tokenizers write " word" as one token and a prompt that ends in a
    space asks for something never seen. The end token follows the completion.

    Args:
        tokenizer: Any tokenizer of transformers.
        template: Text with {prompt} and {completion}, or "chat".
        max_length: Tokens a row is cut to.
        learn: Assistant turns of a chat to learn.
        compared_with: Another chat template, which must ask as the tokenizer's does.

    Raises:
        DataError: The template does not work with this tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_length: int,
        *,
        learn: Learn = "all",
        compared_with: Template | None = None,
    ) -> None:
        self._max_length = max_length
        self._learn = learn
        self._notes: dict[str, str] = {}  # by what they are about
        # Read once: a tokenizer looks its special tokens up anew at every call.
        special = {str(t): int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        # The longest first, so that a search takes the whole one.
        special = dict(sorted(special.items(), key=lambda item: -len(item[0])))
        self._special_pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._special_ids = frozenset(special.values())
        self._bos, self._bos_id = tokenizer.bos_token, tokenizer.bos_token_id
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token (eos_token), so the model could not learn to "
                "stop; set eos_token in the tokenizer's tokenizer_config.json"
            )
        self._eos_id = int(tokenizer.eos_token_id)
        self._template = None if template == "chat" else TextTemplate(template)
        self._chat = None
        if template == "chat":
            self._chat = ChatRenderer(tokenizer, tuple(special), compared_with)
        self._segment_tokenizer = SegmentTokenizer(tokenizer, tuple(special))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about tokenizer and template, as far as rows have shown it."""
        of_chat = self._chat.notes if self._chat else {}
        return (*self._notes.values(), *of_chat)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's end token, and the chat template's if another."""
        ends = {self._eos_id: None}
        if self._chat is not None:
            question = {"role": "user", "content": "a"}
            answer = {"role": "assistant", "content": "b"}
            turn = self._chat.segments(Chat((question, answer)), only_last=True)[-1].text
            if self._chat.ends_turn(turn):
                ends[self._segment_tokenizer.ids(turn)[-1]] = None
        return tuple(ends)

    @property
    def last_token_ids(self) -> tuple[int, ...]:
        """Ids that a whole row may end with: in chats any special token, else the end token."""
        # Templates end calls of tools with another token than answers.
        special = sorted(self._special_ids) if self._chat is not None else ()
        return tuple(dict.fromkeys((self._eos_id, *special)))

    def parts(self, example: Pair | Chat) -> list[Pair | Chat]:
        """What becomes a row of its own: the example, or a chat up to each turn to learn."""
        if isinstance(example, Pair) and example.history and self._text_template(example) is None:
            example = example.as_chat()
        if self._learn != "each" or isinstance(example, Pair):
            return [example]
        return [
            replace(
                example,
                messages=example.messages[: turn + 1],
                context=example.context.union(range(turn)),
            )
            for turn in example.learnt
        ]

    def encode(self, example: Pair | Chat, row: int) -> TokenizedRow:
        """Encode one of the `parts` of an example, which is row number `row` of its source.

        Its ids are cut at the maximal length. DataError: the template does not give it back.
        """
        return self.encode_laid_out([self.lay_out(example)], [row])[0]

    def lay_out(self, example: Pair | Chat) -> Layout:
        """Write an example out as text; DataError where the template does not give it back."""
        if isinstance(example, Pair) and (template := self._text_template(example)) is not None:
            _refuse_chat_parts(example)
            texts = zip(template.render(example), (False, True), strict=True)
            segments = [Segment(text, is_trained) for text, is_trained in texts if text]
            own = [example.prompt, example.completion, example.system or ""]
            return Layout(segments, self._prefix(segments), self._holds_special(own), False)
        chat = example.as_chat() if isinstance(example, Pair) else example
        self._take_notes(chat)
        # The template writes its own special tokens, so the tokenizer adds none.
        segments = self._renderer().segments(chat, only_last=self._learn != "all")
        return Layout(segments, (), self._holds_special(_texts_of(chat)), True)

    def encode_laid_out(
        self, layouts: Sequence[Layout], numbers: Sequence[int]
    ) -> list[TokenizedRow]:
        """Tokenise many rows in one call, which a fast tokenizer shares out over its threads.

        Each row is as from `encode`; one with nothing left to learn is empty, with `FULL_PROMPT`.
        """
        pieces = list(self._segment_tokenizer.rows([layout.segments for layout in layouts]))
        learnt = [
            (place, piece, segment.text)
            for place, layout in enumerate(layouts)
            for segment, piece in zip(layout.segments, pieces[place], strict=True)
            if segment.is_trained
        ]
        decoded = self._segment_tokenizer.decode_all([piece for _, piece, _ in learnt])
        inexact = {
            place
            for (place, _, text), back in zip(learnt, decoded, strict=True)
            if not self._segment_tokenizer.are_same(back, text)
        }
        return [
            self._assemble(*each, is_exact=place not in inexact)
            for place, each in enumerate(zip(layouts, pieces, numbers, strict=True))
        ]

    def _assemble(
        self, layout: Layout, pieces: Sequence[list[int]], number: int, *, is_exact: bool
    ) -> TokenizedRow:
        ids: list[int] = list(layout.prefix)
        labels: list[int] = [IGNORED] * len(ids)
        for segment, piece in zip(layout.segments, pieces, strict=True):
            ids += piece
            labels += piece if segment.is_trained else [IGNORED] * len(piece)
        bos, eos = self._bos_id, self._eos_id
        if bos is not None and bos != eos and ids[:2] == [bos, bos]:
            self._notes["two starts"] = (
                f"rows begin with {self._bos!r} twice, which no model has seen in "
                "pretraining: take it out of the chat template, or out of the rows"
            )
        # A text that its tokenizer drops as a whole leaves no id.
        last = ids[-1] if ids else None
        if not (last in self._special_ids if layout.is_chat else last == eos):
            ids.append(eos)
            labels.append(eos)
        labels[0] = IGNORED
        end = self._max_length
        has_learnt = any(label != IGNORED for label in itertools.islice(labels, end))
        marks = Mark(
            Mark.SPECIAL * layout.holds_special_tokens
            | Mark.INEXACT * (not is_exact)
            | Mark.CUT * (len(ids) > end)
            | Mark.FULL_PROMPT * (not has_learnt)
        )
        kept = end if has_learnt else 0
        return TokenizedRow(ids[:kept], labels[:kept], number, marks)

    def encode_prompt(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        system: str | None = None,
        tools: tuple[Any, ...] | None = None,
    ) -> list[int]:
        """The ids that stand before the answer in training, for generation to continue.

        `prompt` is what the prompt column holds, or chat messages up to a user's, which may have
        `tools` beside them.
        """
        prefix: Sequence[int] = ()
        if not isinstance(prompt, str):
            segments = self._chat_prompt(tuple(prompt), tools)
        elif (template := self._text_template(pair := Pair(prompt, "", system))) is None:
            segments = self._chat_prompt(pair.as_chat().messages[:-1])
        else:
            text, _ = template.render(pair)
            segments = [Segment(text, False)] if text else []
            prefix = self._prefix(segments)
        (pieces,) = self._segment_tokenizer.rows([segments])
        return [*prefix, *itertools.chain.from_iterable(pieces)]

    def pieces(self, row: TokenizedRow) -> tuple[tuple[str, bool], ...]:
        """The row as decoded from its ids: stretches of text, each learnt or not."""
        marked = zip(row.input_ids.tolist(), (row.labels != IGNORED).tolist(), strict=True)
        groups = itertools.groupby(marked, key=lambda pair: pair[1])
        return tuple(
            (self.decode([token for token, _ in group]), is_trained) for is_trained, group in groups
        )

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Text of the ids with special tokens written out and no spaces tidied away."""
        return self._segment_tokenizer.decode(ids)

    def _holds_special(self, texts: Sequence[str]) -> bool:
        return any(self._special_pattern.search(text) for text in texts)

    def _take_notes(self, chat: Chat) -> None:
        """Keep what a user should know about a row; of equal notes only the first."""
        for note in chat.notes:
            self._notes.setdefault(note.partition(" (first: ")[0], note)

    def _chat_prompt(
        self, messages: tuple[Mapping[str, Any], ...], tools: tuple[Any, ...] | None = None
    ) -> list[Segment]:
        text = self._renderer().prompt(messages, tools)
        past = [i for i, message in enumerate(messages) if is_answer(message)]
        if not past or self._learn != "all":
            return [Segment(text, False)]
        # Earlier answers are cut as they were in training, so that the ids are the same. A template
        # that changes them afterwards trains last answers only, behind one stretch of text.
        try:
            segments = self._renderer().segments(Chat(messages[: past[-1] + 1], tools))
        except DataError:
            return [Segment(text, False)]
        length = sum(len(segment.text) for segment in segments)
        if text[:length] != "".join(segment.text for segment in segments):
            return [Segment(text, False)]
        return [*segments, Segment(text[length:], False)]

    def _text_template(self, example: Pair) -> TextTemplate | None:
        """The template to put around a pair; None where the chat template writes it."""
        return _PLAIN if example.is_plain else self._template

    def _renderer(self) -> ChatRenderer:
        if self._chat is None:
            raise DataError(
                "chat messages need the tokenizer's chat template; set dataset.template to chat"
            )
        return self._chat

    def _prefix(self, segments: Sequence[Segment]) -> list[int]:
        """The ids that the tokenizer puts first, unless the template wrote them already."""
        first = segments[0].text if segments else ""
        bos = self._bos
        if not (self._segment_tokenizer.start_ids and bos and first.startswith(bos)):
            return self._segment_tokenizer.start_ids
        self._notes["start of the template"] = (
            f"dataset.template starts with {bos!r}, which the tokenizer adds by itself: it is "
            "written once; remove it from the template"
        )
        return []


def answer_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that an answer ends with: the tokenizer's end token, and its chat template's if another.

    Base models often have a chat template whose turns end with a token that they do not stop at.
    """
    if tokenizer.chat_template:
        # One that cannot be trained on has trained nothing.
        with suppress(DataError):
            return Encoder(tokenizer, "chat", 2).end_token_ids
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def _texts_of(chat: Chat) -> list[str]:
    """All texts that come from the row itself: messages, reasoning, calls, tools."""
    texts = [json.dumps(chat.tools, ensure_ascii=False, default=str)] if chat.tools else []
    for message in chat.messages:
        texts.append(str(message["content"]))
        more = {key: value for key, value in message.items() if key not in ("role", "content")}
        if more:
            texts.append(json.dumps(more, ensure_ascii=False, default=str))
    return texts


def _refuse_chat_parts(pair: Pair) -> None:
    for part, column in ((pair.history, "history"), (pair.tools, "tools")):
        if part:
            raise DataError(
                f"the row has {column}, which a text template cannot write; expected "
                "dataset.template: chat (the tokenizer's own template), or leave it out with "
                f"dataset.ignore_columns: [{column}]"
            )


@dataclass(frozen=True, slots=True)
class _Lead:
    """A text that another is read behind, with its ids."""

    text: str
    ids: list[int]

    def cut(self, ids: list[int]) -> list[int] | None:
        """The ids behind its own; None where the two texts have run together."""
        start = len(self.ids)
        return ids[start:] if ids[:start] == self.ids else None


class SegmentTokenizer:
    """A tokenizer that adds nothing of its own but `start_ids`, which it puts before a whole text.

    SentencePiece puts a space before whatever it is given, which is wrong inside a row: there a
    segment is read behind a newline, which is cut off. Behind a special token it is read behind
    that token, as where a whole text is read at once: some tokenizers put a space there too, and
    some tokens take the spaces behind them away.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.start_ids = self._find_start_ids()
        newline_ids = self.ids("\n")
        self._adds_space = self.ids("\na")[len(newline_ids) :] != self.ids("a")
        self._special_tokens = tuple(special_tokens)  # the longest first
        # What a segment is read behind, by the special token that the one before ends with.
        self._leads = {"": _Lead("\n", newline_ids) if self._adds_space else _Lead("", [])}

    def ids(self, text: str) -> list[int]:
        """The ids of a text at the start of a row."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def rows(self, rows: Sequence[Sequence[Segment]]) -> Iterator[list[list[int]]]:
        """The ids of every segment of every row, in one call that a fast tokenizer shares out."""
        leads = [
            self._lead(segments[index - 1].text) if index else _Lead("", [])
            for segments in rows
            for index in range(len(segments))
        ]
        segments = (segment for each in rows for segment in each)
        texts = [lead.text + segment.text for lead, segment in zip(leads, segments, strict=True)]
        # Only the ids are asked for: the rest costs as much again.
        batch = self._tokenizer(
            texts or [""],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        found = iter(zip(batch["input_ids"], leads, strict=True)) if texts else iter(())
        for each in rows:
            pieces = []
            for segment in each:
                ids, lead = next(found)
                cut = lead.cut(ids)
                pieces.append(self.ids(segment.text) if cut is None else cut)
            yield pieces

    def _lead(self, before: str) -> _Lead:
        """What a segment is read behind, by the text of the one before."""
        token = ""
        if before.endswith(self._special_tokens):
            token = next(each for each in self._special_tokens if before.endswith(each))
        if token not in self._leads:
            usual, own = self._leads[""], _Lead(token, self.ids(token))
            is_usual = all(
                own.cut(self.ids(own.text + text)) == usual.cut(self.ids(usual.text + text))
                for text in ("a", " a", "\na")
            )
            self._leads[token] = usual if is_usual else own
        return self._leads[token]

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Text of the ids with special tokens written out and no spaces tidied away."""
        return str(
            self._tokenizer.decode(
                [int(each) for each in ids],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )

    def are_same(self, decoded: str, text: str) -> bool:
        """Whether ids that decode to one text are exactly those of another."""
        # Tokenizers that put a space first drop it again when they decode.
        return decoded == text or (self._adds_space and decoded.lstrip() == text.lstrip())

    def decode_all(self, pieces: Sequence[list[int]]) -> Sequence[str]:
        """The texts of many pieces, each as from `decode`."""
        kind = type(self._tokenizer)
        if (
            kind.decode is not PreTrainedTokenizerBase.decode
            or getattr(kind, "_decode", None) is not PreTrainedTokenizerFast._decode
        ):
            return [self.decode(ids) for ids in pieces]
        # What `decode` calls in the end, without its look at the type of every single id.
        backend: Any = self._tokenizer
        texts: list[str] = backend.backend_tokenizer.decode_batch(
            list(pieces), skip_special_tokens=False
        )
        return texts

    def _find_start_ids(self) -> list[int]:
        """What the tokenizer puts before a text; what it may put behind is not taken."""
        plain = self.ids("a")
        full = list(self._tokenizer("a", add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        return []
