"""A proof, on the model that is about to be trained, that packed rows do not see each other.

Whether they do depends on the architecture, the attention, transformers' version and the code of
the model, so it is not looked up: it is tried. Three forward passes more, once a run.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kpsvd_tune.data import IGNORED, TokenizedRow
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.processes import gather_numbers
from kpsvd_tune.training.batches import make_micro_batch
from kpsvd_tune.training.loss import SummedTokenLoss, evaluating

# Rows that are tried; more would show nothing new.
_NUM_ROWS = 4
# By the bits that the model computes in, the mean difference a token, in nats, that rounding alone
# may make: where one row is changed and all shapes stay (experts see other groups of tokens even
# then), and between packed rows and rows alone, whose products have other shapes. A mean, for in
# 16 bits rounding may send a token to another expert.
_TOLERANCES = {32: (1e-5, 1e-4), 16: (1e-2, 5e-2)}


def prove_packing(
    token_loss: SummedTokenLoss, rows: Sequence[TokenizedRow], accelerator: Accelerator
) -> None:
    """Refuse a model in which packed rows have other losses than alone, or change each other's.

    Every token counts, prompts too. All processes must ask, with as many rows.
    """
    rows = [_all_learnt(row) for row in rows[:_NUM_ROWS]]
    if len(rows) < 2:
        return
    model = token_loss.model
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(base).__name__
    if not _takes_positions(base):
        raise _refusal(f"{name} takes no position_ids, by which packed rows are told apart")
    with evaluating(token_loss):
        alone = torch.cat([_losses(token_loss, [row], accelerator, False) for row in rows])
        packed = _losses(token_loss, rows, accelerator, True)
        changed = _losses(token_loss, [_changed(rows[0], rows), *rows[1:]], accelerator, True)
    first = rows[0].num_supervised
    own = [_distance(changed[first:], packed[first:]), _distance(packed, alone)]
    # The largest of all processes, so that all refuse or none.
    leak, shift = (max(each) for each in zip(*gather_numbers(accelerator, own), strict=True))
    allowed_leak, allowed_shift = _TOLERANCES[_bits(token_loss, accelerator)]
    if leak > allowed_leak:
        raise _refusal(
            f"{name} lets packed rows see each other: changing one row changes the losses of the "
            f"rows behind it by {leak:.1e} nats a token, expected at most {allowed_leak:.0e}"
        )
    if shift > allowed_shift:
        raise _refusal(
            f"{name} gives packed rows other losses than the same rows alone: by {shift:.1e} nats "
            f"a token, expected at most {allowed_shift:.0e}"
        )


def _refusal(reason: str) -> RecipeError:
    error = RecipeError(
        f"train.packing: {reason}. Set train.packing: false; train.group_by_length: true spares "
        "most of the padding without it"
    )
    error.is_everywhere = True
    return error


def _losses(
    token_loss: SummedTokenLoss,
    rows: Sequence[TokenizedRow],
    accelerator: Accelerator,
    packing: bool,
) -> Tensor:
    """Losses of all tokens of the rows, one row behind the other."""
    batch = make_micro_batch(rows, pad_token_id=0, packing=packing)
    with torch.no_grad():
        losses: Tensor = token_loss(**batch.to(accelerator.device), reduction="none")
    return losses.float()


def _distance(losses: Tensor, others: Tensor) -> float:
    """Mean difference in nats; 0 where a loss is not finite, of which the first step will tell."""
    difference = (losses - others).abs().mean().item() if len(losses) else 0.0
    return difference if difference < float("inf") else 0.0


def _all_learnt(row: TokenizedRow) -> TokenizedRow:
    labels = row.input_ids.copy()
    labels[0] = IGNORED
    return TokenizedRow(row.input_ids, labels, row.row)


def _changed(row: TokenizedRow, rows: Sequence[TokenizedRow]) -> TokenizedRow:
    """The row with every token another one, of those that the rows hold."""
    known = np.concatenate([each.input_ids for each in rows])
    low, high = known.min(), known.max()
    return TokenizedRow(np.where(row.input_ids == high, low, high), row.labels, row.row)


def _takes_positions(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(each.name == "position_ids" or each.kind is each.VAR_KEYWORD for each in parameters)


def _bits(token_loss: SummedTokenLoss, accelerator: Accelerator) -> int:
    """Bits of the numbers that the model computes with: 16 for fewer, too."""
    is_short = any(p.is_floating_point() and p.itemsize < 4 for p in token_loss.parameters())
    # Quantised weights are computed with in 16 bits or fewer.
    is_short = is_short or any(not p.is_floating_point() for p in token_loss.parameters())
    return 16 if is_short or accelerator.mixed_precision != "no" else 32


NAME = "sdpa_by_rows"
# The blocks of masks that are in use: a mask serves many layers. Each is a first token, an end and
# whether the block is causal and nothing more.
Block = tuple[int, int, bool]
_blocks: Any = WeakIdKeyDictionary()


def attend_by_rows(model: nn.Module) -> None:
    """Let a model that uses torch's attention (sdpa) compute packed rows one by one.

    Models with another attention are left alone. Nothing else that the model computes changes.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(getattr(base, "config", None), "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, sdpa_by_rows)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base.set_attn_implementation(NAME)


def sdpa_by_rows(
    module: nn.Module,
    query: Tensor,  # (B, heads, T, head size)
    key: Tensor,  # (B, key heads, T, head size)
    value: Tensor,  # (B, key heads, T, value size)
    attention_mask: Tensor | None,  # (B, 1, T, T) bool, True where a query sees a key; or another
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (B, T, heads, value size), and None in place of attention weights
    """Transformers' `sdpa_attention_forward`, one call a block of the mask."""
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
