"""Put rows of similar length into one batch, which spares padding, and keep the order random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kpsvd_tune.data.encode.tokenized import TokenizedRow
from kpsvd_tune.data.rows.stored_rows import StoredRows

# Batches whose rows are sorted together. More would spare little and make batches more alike.
_BATCHES_A_WINDOW = 50
# An epoch has at least so many windows, or small data would be sorted as a whole.
_WINDOWS = 4


def row_lengths(rows: Sequence[TokenizedRow]) -> list[int]:
    """Tokens of each row, without reading rows that lie on disk."""
    if isinstance(rows, StoredRows):
        lengths: list[int] = rows.lengths.tolist()
        return lengths
    return [len(row.input_ids) for row in rows]


def group_by_length(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, num_head: int, key: str
) -> list[int]:
    """Rearrange one epoch's shuffled rows so that each whole batch has rows of similar length.

    The shuffled rows are cut into windows of up to 50 batches, each window is sorted by length
    and cut into batches, and the batches of all windows are shuffled. Rows that share a batch
    with a neighbouring epoch, at either end, stay as they are.

    Args:
        order: The epoch's rows, shuffled.
        lengths: Tokens of every row, by row number.
        batch_size: Rows of a batch.
        num_head: Rows at the start that complete the last batch of the epoch before.
        key: Decides the order of batches; the same on every machine and version.

    Returns:
        The same rows in another order.
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
