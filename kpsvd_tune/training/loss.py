"""The loss of a batch: cross-entropy summed over supervised tokens, with no logits beyond those.

Shape letters: B rows, T tokens of the longest row, K supervised tokens of the batch, H hidden size,
V vocabulary size. Packed rows are one row (B = 1) of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.processes import gather_numbers
from kpsvd_tune.training.batches import MicroBatch


class SummedTokenLoss(nn.Module):
    """A causal language model with its loss, as one module, so that DDP wraps both.

    The model's output projection gets the hidden states of supervised positions only, through a
    hook on that module: whatever the model does to logits afterwards (scaling, soft caps) still
    happens, and a prompt costs no V numbers a token. A model without such a module, or one that
    calls it with another shape, gives all logits, and the same positions are taken from those.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model  # of transformers, or a PEFT model around one
        # Whether each process holds a part of the weights, so that all of them must call the model
        # equally often.
        self.is_sharded = False

    def forward(
        self,
        input_ids: Tensor,  # (B, T) int64
        positions: Tensor,  # (K,) int64, indices into the flattened (B * T)
        targets: Tensor,  # (K,) int64, the token that follows each position
        attention_mask: Tensor | None = None,  # (B, T) int64, 0 on padding; None for packed rows
        position_ids: Tensor | None = None,  # (1, T) int64, from 0 in each packed row; None: padded
        reduction: str = "sum",  # or "none"
    ) -> Tensor:
        """The summed loss in nats, a float32 scalar, 0 where K is 0; or each loss, (K,) float32."""
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


@contextmanager
def evaluating(token_loss: SummedTokenLoss) -> Iterator[None]:
    """Evaluation mode inside, the mode of before afterwards."""
    was_training = token_loss.training
    token_loss.eval()
    try:
        yield
    finally:
        token_loss.train(was_training)
        if isinstance(token_loss, FSDPModule):
            # A forward pass without a backward pass leaves the weights whole on each process.
            token_loss.reshard()


def validation_loss(
    token_loss: SummedTokenLoss,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    accelerator: Accelerator,
    make_batch: Callable[[Sequence[TokenizedRow]], MicroBatch],
    stop_requested: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss over the supervised tokens of one or more rows, divided over the processes.

    In nats per token, equal on all processes; None where `stop_requested`, asked before every
    batch, is true on any. A process takes `batch_size` rows at a time. The model is in evaluation
    mode meanwhile and comes back in the mode it was in. No random number is drawn.
    """
    # Rows of like length share a batch, which spares padding; padding changes no result.
    ordered = sorted(rows, key=lambda row: len(row.input_ids), reverse=True)
    stride = batch_size * accelerator.num_processes
    loss, num_supervised = 0.0, 0
    with evaluating(token_loss):
        for first in range(0, len(ordered), stride):
            if any(each for (each,) in gather_numbers(accelerator, [stop_requested()])):
                return None
            own = first + accelerator.process_index * batch_size
            part = ordered[own : own + batch_size]
            # The last round may leave a process without rows. It still takes part in the exchange
            # above, and computes something where others need its part of the weights.
            if part or token_loss.is_sharded:
                batch = make_batch(part or ordered[-1:])
                with torch.no_grad():
                    found = token_loss(**batch.to(accelerator.device)).item()
            if part:
                loss += found
                num_supervised += batch.num_supervised
    sums = gather_numbers(accelerator, [loss, num_supervised])
    # In the order of processes, so that all of them get the same bits.
    return sum(each for each, _ in sums) / max(1.0, sum(each for _, each in sums))
