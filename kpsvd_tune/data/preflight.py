"""The check before training: what will be learnt, and what would silently go wrong."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.stored_rows import StoredRows
from kpsvd_tune.data.tokenized import IGNORED, TokenizedRow
from kpsvd_tune.errors import DataError


def check_supervision(
    rows: Sequence[TokenizedRow], truncated: Sequence[bool], end_token_ids: Sequence[int]
) -> None:
    """Refuse rows that would train nothing, or a model that never stops.

    Args:
        rows: Rows to train on.
        truncated: For each row whether it was cut, which takes its end token away rightly.
        end_token_ids: Ids that end an answer.

    Raises:
        DataError: No token is learnt, or a whole row's end token is not.
    """
    if not any(row.num_supervised for row in rows):
        raise DataError(
            f"none of the tokens of the {len(rows)} training rows would be trained; expected at "
            "least one: raise dataset.max_length if the prompts fill it, and check that the "
            "completion column holds text"
        )
    for row, is_cut in zip(rows, truncated, strict=True):
        last = next((label for label in reversed(row.labels) if label != IGNORED), None)
        if not is_cut and last not in end_token_ids:
            raise DataError(
                f"row {row.row}: the end token is not trained (the last trained token is {last}, "
                f"expected one of {', '.join(map(str, end_token_ids))}), so the model would never "
                "stop; labels must be made before padding and keep the end token"
            )


def check_known_tokens(rows: Sequence[TokenizedRow], num_embeddings: int) -> None:
    """Refuse token ids that the model has no embedding for, as added special tokens may be.

    Args:
        rows: Rows to train or validate on.
        num_embeddings: Rows of the model's input embedding.

    Raises:
        DataError: An id is `num_embeddings` or more.
    """
    # A store knows its largest id, which spares reading many millions of rows.
    if isinstance(rows, StoredRows) and rows.max_token_id < num_embeddings:
        return
    for row in rows:
        if (largest := max(row.input_ids)) >= num_embeddings:
            raise DataError(
                f"row {row.row}: token id {largest} has no embedding, the model has "
                f"{num_embeddings}; tokens were added to the tokenizer and not to the model: use "
                "the tokenizer that belongs to the model, or resize the model's embedding and "
                "save it first"
            )


def tokenizer_warnings(tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """What is unusual about a tokenizer, and what follows from it."""
    warnings = []
    if tokenizer.pad_token_id is None:
        warnings.append(
            "the tokenizer has no pad token: batches are padded with the end token, which is "
            "harmless here since padding is masked by its position"
        )
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        warnings.append(
            f"pad and end token are the same ({tokenizer.eos_token!r}): padding is masked by its "
            "position here, so the end token is trained; elsewhere give pad a token of its own"
        )
    if max_length > tokenizer.model_max_length:
        warnings.append(
            f"dataset.max_length is {max_length} and the tokenizer's model takes "
            f"{tokenizer.model_max_length} tokens: lower dataset.max_length"
        )
    return warnings


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad batches with: the pad token, or the end token where there is none."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id)
