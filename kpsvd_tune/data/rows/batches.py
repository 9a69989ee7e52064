"""Which rows go into which step, and how they become tensors."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kpsvd_tune.data.encode.encoder import IGNORED, TokenizedRow
from kpsvd_tune.data.rows.store import StoredRows


def collate(
    rows: Sequence[TokenizedRow], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """Right-pad rows to a common length.

    Padding is known by its position and never by its id: a tokenizer whose pad token is its end
    token still trains every end token.

    Args:
        rows: At least one row.
        pad_token_id: Id to fill `input_ids` with.
        pad_to_multiple_of: Round the common length up to a multiple of this.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (rows, length) int64; `labels` is -100
        where nothing is learnt.

    Raises:
        ValueError: No rows.
    """
    if not rows:
        raise ValueError("collate got no rows; expected at least one")
    length = max(map(len, rows))
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    fillers = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    batch = {name: np.full((len(rows), length), fill, np.int64) for name, fill in fillers.items()}
    for index, row in enumerate(rows):
        batch["input_ids"][index, : len(row)] = row.input_ids
        batch["attention_mask"][index, : len(row)] = 1
        batch["labels"][index, : len(row)] = row.labels
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def pack(rows: Sequence[TokenizedRow]) -> dict[str, Tensor]:
    """Lay rows end to end in one sequence, without padding.

    Positions start anew with each row, which is how models of transformers know the rows apart. No
    row's first token is learnt: nothing in its own row predicts it.

    Args:
        rows: At least one row.

    Returns:
        `input_ids`, `position_ids` and `labels`, each (1, all tokens) int64; `labels` is -100
        where nothing is learnt.

    Raises:
        ValueError: No rows.
    """
    if not rows:
        raise ValueError("pack got no rows; expected at least one")
    labels = np.concatenate([row.labels for row in rows])
    labels[np.cumsum([0, *map(len, rows[:-1])])] = IGNORED
    batch = {
        "input_ids": np.concatenate([row.input_ids for row in rows]),
        "position_ids": np.concatenate([np.arange(len(row)) for row in rows]),
        "labels": labels,
    }
    return {
        name: torch.from_numpy(values.astype(np.int64)[np.newaxis])
        for name, values in batch.items()
    }


@dataclass(eq=False)
class StatelessSampler:
    """An endless stream of shuffled epochs, cut into equal global batches.

    Step s takes stream positions [s*G, (s+1)*G) with G = batch_size * num_processes *
    gradient_accumulation: a step may reach over the end of an epoch, and no batch is ever
    partial. Equal G means equal rows a step, however G is factored.

    With `lengths` the rows of a step are of similar length, by `group_by_length`, and a step's
    rows are dealt out in order of length, so that each micro batch spans as little as it can. Then
    the order of an epoch is f(seed, epoch, lengths, G).

    ValueError: a size is below 1, or there is not one length a row.
    """

    num_rows: int  # in the data set
    batch_size: int  # rows per process and micro step
    num_processes: int  # that share a step
    gradient_accumulation: int  # micro steps per step
    seed: int  # of the orders
    lengths: Sequence[int] | None = None  # tokens of every row, to group rows by

    def __post_init__(self) -> None:
        for name in ("num_rows", "batch_size", "num_processes", "gradient_accumulation"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if self.lengths is not None and len(self.lengths) != self.num_rows:
            raise ValueError(
                f"got {len(self.lengths)} lengths; expected one for each of {self.num_rows} rows"
            )
        # A batch touches neighbouring epochs only: two orders are enough.
        self._order = lru_cache(maxsize=2)(self._make_order)

    @property
    def global_batch_size(self) -> int:
        """Rows of one step over all processes and micro steps."""
        return self.batch_size * self.num_processes * self.gradient_accumulation

    def batch(self, step: int, micro_step: int, process_index: int) -> list[int]:
        """The `batch_size` rows of one micro step on one process, all counted from 0.

        Raises IndexError for a step, micro step or process that is out of its range.
        """
        for name, value, end in (
            ("step", step, math.inf),
            ("micro_step", micro_step, self.gradient_accumulation),
            ("process_index", process_index, self.num_processes),
        ):
            if not 0 <= value < end:
                raise IndexError(f"{name} is {value}; expected at least 0 and below {end}")
        start = (micro_step * self.num_processes + process_index) * self.batch_size
        own = slice(start, start + self.batch_size)
        first = step * self.global_batch_size
        positions = range(first, first + self.global_batch_size)
        if self.lengths is None:
            return [self._row(position) for position in positions[own]]
        rows = map(self._row, positions)
        return sorted(rows, key=self.lengths.__getitem__, reverse=True)[own]

    def epoch(self, step: int) -> float:
        """Passes over the rows once `step` steps are done."""
        return step * self.global_batch_size / self.num_rows

    def num_steps(self, epochs: float) -> int:
        """Steps that `epochs` passes take: ceil(epochs * num_rows / G), at least 1."""
        # Rounded first: 0.1 * 30 is a little more than 3 in floating point, and not a step more.
        rows = round(epochs * self.num_rows, 6)
        return max(1, math.ceil(rows / self.global_batch_size))

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        return self._order(epoch)[offset]

    def _make_order(self, epoch: int) -> Sequence[int]:
        key = f"epoch {self.seed} {epoch}"
        order = permutation(self.num_rows, key)
        if self.lengths is None:
            return order
        size = self.global_batch_size
        num_head = -epoch * self.num_rows % size
        return group_by_length(order, self.lengths, size, num_head, f"batches of {key}")


def permutation(num_rows: int, key: str) -> array[int]:
    """A shuffled [0, num_rows), the same for a key on every machine and version.

    The standard library promises this of its generator; torch and numpy do not of theirs.
    """
    order = array("q", range(num_rows))  # a fifth of a list's memory
    random.Random(key).shuffle(order)
    return order


# Batches whose rows are sorted together. More would spare little and make batches more alike.
_BATCHES_A_WINDOW = 50
# An epoch has at least so many windows, or small data would be sorted as a whole.
_WINDOWS = 4


def row_lengths(rows: Sequence[TokenizedRow]) -> list[int]:
    """Tokens of each row, without reading rows that lie on disk."""
    if isinstance(rows, StoredRows):
        lengths: list[int] = rows.lengths.tolist()
        return lengths
    return [len(row) for row in rows]


def group_by_length(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, num_head: int, key: str
) -> list[int]:
    """Rearrange one epoch's shuffled rows so that each whole batch has rows of similar length.

    Windows of up to 50 batches are sorted by length, and the batches of all windows shuffled by
    `key`. Batches shared with a neighbouring epoch stay: `num_head` rows belong to the one before.
    """
    head, rest = list(order[:num_head]), order[num_head:]
    num_batches = len(rest) // batch_size
    window = batch_size * max(1, min(_BATCHES_A_WINDOW, num_batches // _WINDOWS))
    end = num_batches * batch_size
    batches = []
    for start in range(0, end, window):
        part = sorted(rest[start : min(start + window, end)], key=lengths.__getitem__)
        batches += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
    random.Random(key).shuffle(batches)
    return head + [row for batch in batches for row in batch] + list(rest[end:])
