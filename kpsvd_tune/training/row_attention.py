"""Attention over packed rows at the cost of the rows alone.

Transformers gives packed rows a mask over the whole sequence, in which each row is a block on the
diagonal. torch's attention computes every entry of it: for four rows alike four times too many.
Here the blocks are found in the mask itself and computed one by one, so whatever the mask says
(windows, chunks) holds, and any other mask goes to torch as it is.

Shape letters: T tokens of the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_rows"
# The blocks of masks that are in use: a mask serves many layers. Each is a first token, an end and
# whether the block is causal and nothing more.
Block = tuple[int, int, bool]
_blocks: Any = WeakIdKeyDictionary()


def attend_by_rows(model: nn.Module) -> None:
    """Let a model that uses torch's attention (sdpa) compute packed rows one by one.

    Models with another attention are left alone. Nothing else that the model computes changes.

    Args:
        model: Of transformers, PEFT's wrapper allowed.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(getattr(base, "config", None), "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, sdpa_by_rows)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base.set_attn_implementation(NAME)


def sdpa_by_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' `sdpa_attention_forward`, one call a block of the mask.

    Args:
        module: The attention module.
        query: (B, heads, T, head size).
        key: (B, key heads, T, head size).
        value: (B, key heads, T, value size).
        attention_mask: (B, 1, T, T) bool, True where a query sees a key; or anything that
            transformers may give.
        **kwargs: Passed on.

    Returns:
        (B, T, heads, value size), and None in place of the attention weights.
    """
    # A bias has the whole sequence's shape, and a paged cache has keys of its own.
    is_plain = kwargs.get("position_bias") is None and kwargs.get("cache") is None
    blocks = _blocks_of(attention_mask) if is_plain else []
    if attention_mask is None or len(blocks) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = []
    for start, end, is_causal in blocks:
        inside = slice(start, end)
        # torch computes half of a block that it knows to be causal.
        mask = None if is_causal else attention_mask[:, :, inside, inside]
        own = kwargs | {"is_causal": True}
        q, k, v = (each[:, :, inside] for each in (query, key, value))
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **own)[0])
    return torch.cat(parts, dim=1), None


def _blocks_of(mask: Tensor | None) -> list[Block]:
    """The blocks on the diagonal of a mask; none if it is no mask of packed rows."""
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4:
        return []
    if mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return []
    if mask not in _blocks:
        _blocks[mask] = _find_blocks(mask[0, 0])
    found: list[Block] = _blocks[mask]
    return found


def _find_blocks(mask: Tensor) -> list[Block]:
    """The finest blocks on the diagonal of (T, T) that hold all that is True in a causal mask."""
    # A row begins where a token does not see the one before it.
    starts = (~mask.diagonal(-1)).nonzero().flatten().add(1).tolist()
    bounds = [0, *starts, len(mask)]
    blocks = []
    num_inside = 0
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        block = mask[start:end, start:end]
        num_inside += int(block.sum())
        blocks.append((start, end, torch.equal(block, torch.ones_like(block).tril())))
    return blocks if num_inside == int(mask.sum()) else []
