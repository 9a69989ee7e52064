"""The loss of a batch: cross-entropy summed over supervised tokens, with no logits beyond those.

Shape letters: B rows, T tokens of the longest row, K supervised tokens of the batch, H hidden size,
V vocabulary size. Packed rows are one row (B = 1) of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kpsvd_tune.data import IGNORED, TokenizedRow, collate, pack


class MicroBatch(NamedTuple):
    """One forward pass of one process.

    Attributes:
        inputs: What `SummedTokenLoss` takes.
        num_tokens: Tokens without padding, supervised or not.
    """

    inputs: dict[str, Tensor]
    num_tokens: int

    @property
    def num_supervised(self) -> int:
        """K, the tokens that the loss sums over."""
        return self.inputs["targets"].numel()

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """The inputs on a device."""
        return {name: each.to(device, non_blocking=True) for name, each in self.inputs.items()}


def make_micro_batch(
    rows: Sequence[TokenizedRow],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    packing: bool = False,
) -> MicroBatch:
    """Pad or pack rows and find the positions whose next token has a label, and that token."""
    batch = pack(rows) if packing else collate(rows, pad_token_id, pad_to_multiple_of)
    next_labels = batch.pop("labels").roll(-1, dims=1)
    next_labels[:, -1] = IGNORED
    positions = (next_labels.flatten() != IGNORED).nonzero().squeeze(1)
    inputs = batch | {"positions": positions, "targets": next_labels.flatten()[positions]}
    return MicroBatch(inputs, sum(len(row.input_ids) for row in rows))


class SummedTokenLoss(nn.Module):
    """A causal language model with its loss, as one module, so that DDP wraps both.

    The model's output projection gets the hidden states of supervised positions only, through a
    hook on that module: whatever the model does to logits afterwards (scaling, soft caps) still
    happens, and a prompt costs no V numbers a token. A model without such a module, or one that
    calls it with another shape, gives all logits, and the same positions are taken from those.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Sum the losses.

        Args:
            input_ids: (B, T) int64.
            positions: (K,) int64, indices into the flattened (B * T).
            targets: (K,) int64, the token that follows each position.
            attention_mask: (B, T) int64, 0 on padding; None for packed rows.
            position_ids: (1, T) int64, from 0 in each packed row; None for padded rows.
            reduction: "none" for the loss of each of the K tokens.

        Returns:
            A float32 scalar, in nats; 0 where K is 0. Or (K,) float32.
        """
        # Without a mask, and only then, transformers finds the rows by their positions.
        inputs = {"attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        select = partial(_select_positions, input_ids.shape, positions)
        projection = _output_projection(self.model)
        hook = projection.register_forward_pre_hook(select) if projection is not None else None
        try:
            output = self.model(input_ids=input_ids, use_cache=False, **inputs)
        finally:
            if hook is not None:
                hook.remove()
        logits = output.logits
        # K is at most B * (T - 1), so the shapes tell which of the two came back.
        is_whole = logits.shape[:2] == input_ids.shape
        logits = logits.flatten(0, 1)
        if is_whole:
            logits = logits.index_select(0, positions)
        return F.cross_entropy(logits.float(), targets, reduction=reduction)


def _output_projection(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    projection = get() if get is not None else None
    return projection if isinstance(projection, nn.Module) else None


def _select_positions(
    shape: torch.Size, positions: Tensor, _module: nn.Module, arguments: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Hook: (B, T, H) becomes (1, K, H); anything else passes as it is."""
    if not arguments or arguments[0].shape[:-1] != shape:
        return None
    hidden = arguments[0].flatten(0, 1).index_select(0, positions)
    return (hidden.unsqueeze(0), *arguments[1:])
