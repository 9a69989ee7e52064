"""Padding: by position, never by id."""

from __future__ import annotations

import pytest
import torch

from kpsvd_tune.data.encode.encoder import TokenizedRow
from kpsvd_tune.data.rows.batches import collate, pack

ROWS = [
    TokenizedRow((5, 6, 2), (-100, 6, 2), 1),
    TokenizedRow((7, 2), (-100, 2), 2),
]


def test_rows_are_padded_on_the_right_and_the_end_token_kept_where_it_pads() -> None:
    batch = collate(ROWS, pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("multiple", "length"), [(None, 3), (1, 3), (3, 3), (4, 4), (8, 8)])
def test_length_is_rounded_up(multiple: int | None, length: int) -> None:
    batch = collate(ROWS, 0, multiple)
    assert all(tensor.shape == (2, length) for tensor in batch.values())
    assert (batch["labels"][:, 3:] == -100).all()
    assert (batch["attention_mask"].sum(1) == torch.tensor([3, 2])).all()


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="collate got no rows"):
        collate([], 0)


def test_packed_rows_lie_end_to_end_with_positions_of_their_own() -> None:
    # The last row learns its first token, which nothing in that row predicts.
    batch = pack([*ROWS, TokenizedRow((8, 9), (8, 9), 3)])
    assert batch["input_ids"].tolist() == [[5, 6, 2, 7, 2, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 2, -100, 2, -100, 9]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    with pytest.raises(ValueError, match="pack got no rows"):
        pack([])
