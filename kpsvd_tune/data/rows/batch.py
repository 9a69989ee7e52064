"""Put tokenised rows into one batch of tensors: padded to one length, or packed end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kpsvd_tune.data.encode.tokenized import IGNORED, TokenizedRow


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
    length = max(len(row.input_ids) for row in rows)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    batch = {
        "input_ids": torch.full((len(rows), length), pad_token_id, dtype=torch.int64),
        "attention_mask": torch.zeros((len(rows), length), dtype=torch.int64),
        "labels": torch.full((len(rows), length), IGNORED, dtype=torch.int64),
    }
    for index, row in enumerate(rows):
        end = len(row.input_ids)
        batch["input_ids"][index, :end] = torch.tensor(row.input_ids)
        batch["attention_mask"][index, :end] = 1
        batch["labels"][index, :end] = torch.tensor(row.labels)
    return batch


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
    ids = [token for row in rows for token in row.input_ids]
    positions = [position for row in rows for position in range(len(row.input_ids))]
    labels = [label for row in rows for label in (IGNORED, *row.labels[1:])]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
    }
