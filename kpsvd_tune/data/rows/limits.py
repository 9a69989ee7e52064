"""What the base model can take: how long a row, and which token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Names of configurations for the number of positions; transformers maps others to the first.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# Learnt or tabulated absolute positions: wpe, embed_positions, position_embeddings, pos_encoding.
_TABLE = re.compile(r"wpe|embed_pos|pos\w*_emb|pos_enc")
# The table of this one is made anew for longer rows.
_GROWING = ("xglm",)
# Takes positions from a bias of fixed width that is no tensor of the model.
_FIXED = ("mpt",)


@dataclass(frozen=True)
class ModelLimits:
    """What rows must keep to.

    Attributes:
        positions: Most tokens of a row; None where the configuration names no limit.
        is_hard: Whether the model has no positions beyond (they are learnt or tabulated), so that
            longer rows end in an error; else (rotary positions) it was merely not trained there.
        vocabulary: Rows of the input embedding: ids are below it.
    """

    positions: int | None
    is_hard: bool
    vocabulary: int


def model_limits(skeleton: Any) -> ModelLimits:
    """Read the limits of a model, which may lie on the meta device.

    Args:
        skeleton: A causal language model of transformers.
    """
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
