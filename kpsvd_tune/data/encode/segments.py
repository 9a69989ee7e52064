"""Tokenise stretches of text so that their ids can be joined into a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kpsvd_tune.data.encode.tokenized import Segment


class SegmentTokenizer:
    """A tokenizer that adds nothing of its own, at the start of a row or inside it.

    SentencePiece tokenizers put a space before whatever they are given. Inside a row that space
    would be wrong, so a segment is then read behind a newline, which is cut off.

    Args:
        tokenizer: Any tokenizer of transformers.

    Attributes:
        start_ids: What the tokenizer itself puts before a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.start_ids = self._find_start_ids()
        self._newline_ids = self.ids("\n")
        self._adds_space = self.ids("\na")[len(self._newline_ids) :] != self.ids("a")

    def ids(self, text: str) -> list[int]:
        """The ids of a text at the start of a row."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def rows(self, rows: Sequence[Sequence[Segment]]) -> Iterator[list[list[int]]]:
        """The ids of every segment of every row.

        The tokenizer is called once, and a fast one shares the texts out over its threads.
        """
        lead = "\n" if self._adds_space else ""
        texts = [
            (lead if index else "") + segment.text
            for segments in rows
            for index, segment in enumerate(segments)
        ]
        # Only the ids are asked for: the rest costs as much again.
        batch = self._tokenizer(
            texts or [""],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        found = iter(batch["input_ids"])
        start = len(self._newline_ids)
        for segments in rows:
            pieces = []
            for index, segment in enumerate(segments):
                ids = next(found)
                if index and self._adds_space:
                    is_clean = ids[:start] == self._newline_ids
                    ids = ids[start:] if is_clean else self.ids(segment.text)
                pieces.append(ids)
            yield pieces

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids with special tokens written out and no spaces tidied away."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def gives_back(self, pieces: Sequence[list[int]], texts: Sequence[str]) -> list[bool]:
        """For each piece whether its ids decode to the text that they were made from."""
        return [
            # Tokenizers that put a space first drop it again when they decode.
            decoded == text or (self._adds_space and decoded.lstrip() == text.lstrip())
            for decoded, text in zip(self._decode_all(pieces), texts, strict=True)
        ]

    def _decode_all(self, pieces: Sequence[list[int]]) -> Sequence[str]:
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
