"""Checks before training: end tokens, token ids and lengths that would silently go wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode.encoder import IGNORED, UNUSABLE, Mark, TokenizedRow
from kpsvd_tune.data.rows.store import StoredRows
from kpsvd_tune.errors import DataError


def check_end_tokens(rows: Sequence[TokenizedRow], end_token_ids: Sequence[int]) -> None:
    """Refuse rows that would train a model that never stops.

    A row that was cut has lost its end token, and one without tokens is not used: both pass.
    """
    for row in rows:
        if row.marks & (Mark.CUT | UNUSABLE):
            continue
        learnt = row.labels[row.labels != IGNORED]
        last = int(learnt[-1]) if len(learnt) else None
        if last not in end_token_ids:
            raise DataError(
                f"row {row.row}: the end token is not trained (the last trained token is {last}, "
                f"expected one of {', '.join(map(str, end_token_ids))}), so the model would never "
                "stop; labels must be made before padding and keep the end token"
            )


def check_known_tokens(
    rows: Sequence[TokenizedRow], num_embeddings: int, where: Callable[[int], str] | None = None
) -> None:
    """Refuse token ids that the model has no embedding for, as added special tokens may be.

    `num_embeddings` are the rows of the model's input embedding; `where` names a row by its place
    in `rows`, for the message (None: by its number). DataError: an id is too large.
    """
    # A store knows its largest id, which spares reading many millions of rows.
    if isinstance(rows, StoredRows) and rows.max_token_id < num_embeddings:
        return
    for place, row in enumerate(rows):
        if (largest := int(row.input_ids.max())) >= num_embeddings:
            raise DataError(
                f"{where(place) if where else f'row {row.row}'}: token id {largest} has no "
                f"embedding, the model has {num_embeddings}; tokens were added to the tokenizer "
                "and not to the model: use the tokenizer that belongs to the model, or resize the "
                "model's embedding and save it first"
            )


def check_lengths(
    lengths: NDArray[np.int64], limits: ModelLimits, max_length: int, where: Callable[[int], str]
) -> list[str]:
    """Refuse rows with more tokens than the model has positions; `where` names a row by its place.

    Gives notes on rows beyond the length that a rotary model is meant for.
    """
    limit = limits.positions
    if limit is None or not (is_longer := lengths > limit).any():
        return []
    first = int(is_longer.argmax())
    number = int(is_longer.sum())
    found = (
        f"{number} row{'s have' if number > 1 else ' has'} more tokens than the {limit} that the "
        f"model takes by its configuration (first: {where(first)}, {int(lengths[first])} tokens)"
    )
    cures = (
        f"set dataset.max_length to {limit} (now {max_length}), which cuts such rows; or leave "
        f"them out with dataset.max_length={limit} dataset.too_long=drop; or take a model with "
        "more positions"
    )
    if limits.is_hard:
        raise DataError(f"{found}; it has no positions beyond: {cures}")
    return [
        f"LONG ROWS: {found}: the base was not made for such positions, and results there are "
        f"uncertain: {cures}, or one whose rope_scaling stretches them"
    ]


def tokenizer_warnings(tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
    """What is unusual about a tokenizer, and what follows for rows of up to `longest` tokens."""
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
    if longest > tokenizer.model_max_length:
        warnings.append(
            f"the longest row has {longest} tokens and the tokenizer says that its model takes "
            f"{tokenizer.model_max_length}: lower dataset.max_length"
        )
    return warnings


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad batches with: the pad token, or the end token where there is none."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id)


# Names of configurations for the number of positions; transformers maps others to the first.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# Learnt or tabulated absolute positions: wpe, embed_positions, position_embeddings, pos_encoding.
_TABLE = re.compile(r"wpe|embed_pos|pos\w*_emb|pos_enc")
# Models that compute a larger table when a row is longer.
_GROWING = ("xglm",)
# Models whose positions are a bias of fixed width, which is no tensor of the model.
_FIXED = ("mpt",)


@dataclass(frozen=True)
class ModelLimits:
    """What rows must keep to."""

    positions: int | None  # most tokens of a row; None where the configuration names no limit
    # Whether the model has no positions beyond (they are learnt or tabulated), so that longer rows
    # end in an error; else (rotary positions) it was merely not trained there.
    is_hard: bool
    vocabulary: int  # rows of the input embedding: ids are below it


def model_limits(skeleton: Any) -> ModelLimits:
    """Read the limits of a causal language model, which may lie on the meta device."""
    config = skeleton.config.get_text_config()
    vocabulary = int(skeleton.get_input_embeddings().num_embeddings)
    named = next(
        (value for key in _POSITIONS if isinstance(value := getattr(config, key, None), int)), None
    )
    if named is None or named < 1:
        return ModelLimits(None, False, vocabulary)
    if config.model_type in _FIXED:
        return ModelLimits(named, True, vocabulary)
    tables = list(_tables(skeleton, named)) if config.model_type not in _GROWING else []
    if tables:
        return ModelLimits(min(tables), True, vocabulary)
    return ModelLimits(max(named, _stretched(config, named)), False, vocabulary)


def _tables(skeleton: Any, named: int) -> Iterator[int]:
    """For each table of absolute positions how many tokens it serves."""
    tensors = [*skeleton.named_parameters(), *skeleton.named_buffers()]
    for name, tensor in tensors:
        # Some keep one or two rows more, for positions that start above 0.
        is_table = tensor.dim() == 2 and named <= tensor.shape[0] <= named + 2
        if not is_table or "rotary" in name or not _TABLE.search(name):
            continue
        module = skeleton.get_submodule(name.rpartition(".")[0])
        padding = getattr(module, "padding_idx", None)
        # RoBERTa counts positions from behind the padding's, within the number it names.
        yield named if padding is None or tensor.shape[0] > named else named - padding - 1


def _stretched(config: Any, named: int) -> int:
    """The length that scaled rotary positions (YaRN, linear, dynamic, Llama 3) are meant for."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return named
    kinds = [rope, *(each for each in rope.values() if isinstance(each, Mapping))]
    lengths = [named]
    for kind in kinds:
        factor = kind.get("factor")
        original = kind.get("original_max_position_embeddings") or named
        if isinstance(factor, int | float) and isinstance(original, int):
            lengths.append(int(factor * original))
    return max(lengths)
