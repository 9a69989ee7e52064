"""A row on its way from text to token ids: stretches of text, a layout, ids and labels."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100  # the label that torch's cross entropy skips


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text that is learnt or not."""

    text: str
    is_trained: bool


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
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row, or None where nothing learnt is left in it, and what happened on the way."""

    row: TokenizedRow | None
    is_truncated: bool
    is_exact: bool
    holds_special_tokens: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """A row as text.

    Attributes:
        segments: Its stretches, learnt or not.
        prefix: Ids that stand before them.
        holds_special_tokens: Whether the row's own text holds the text of a special token.
        is_chat: Whether a chat template wrote it, which may have an end token of its own.
    """

    segments: tuple[Segment, ...]
    prefix: tuple[int, ...]
    holds_special_tokens: bool
    is_chat: bool
