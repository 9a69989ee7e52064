"""The loss on held-out rows: every row once, every supervised token with equal weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.processes import gather_numbers
from kpsvd_tune.training.loss import MicroBatch, SummedTokenLoss
from kpsvd_tune.training.sharding import free, is_sharded


def validation_loss(
    token_loss: SummedTokenLoss,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    accelerator: Accelerator,
    make_batch: Callable[[Sequence[TokenizedRow]], MicroBatch],
    stop_requested: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss over the supervised tokens of all rows, shared out over the processes.

    The model is in evaluation mode meanwhile and comes back in the mode it was in. No random
    number is drawn.

    Args:
        token_loss: The model with its loss, not wrapped for several processes.
        rows: At least one row.
        batch_size: Rows a process takes at a time.
        accelerator: The processes.
        make_batch: Pads rows.
        stop_requested: Asked before every batch; all processes give up when it is true on one.

    Returns:
        Nats per token, equal on all processes; None when it was given up.
    """
    # Rows of like length share a batch, which spares padding; padding changes no result.
    ordered = sorted(rows, key=lambda row: len(row.input_ids), reverse=True)
    stride = batch_size * accelerator.num_processes
    was_training = token_loss.training
    token_loss.eval()
    loss, num_supervised = 0.0, 0
    try:
        for first in range(0, len(ordered), stride):
            if any(each for (each,) in gather_numbers(accelerator, [stop_requested()])):
                return None
            own = first + accelerator.process_index * batch_size
            part = ordered[own : own + batch_size]
            # The last round may leave a process without rows. It still answers the question above,
            # and computes something where others need its part of the weights.
            if part or is_sharded(token_loss):
                batch = make_batch(part or ordered[-1:])
                with torch.no_grad():
                    found = token_loss(**batch.to(accelerator.device)).item()
            if part:
                loss += found
                num_supervised += batch.num_supervised
    finally:
        token_loss.train(was_training)
        free(token_loss)
    sums = gather_numbers(accelerator, [loss, num_supervised])
    # In the order of processes, so that all of them get the same bits.
    return sum(each for each, _ in sums) / max(1.0, sum(each for _, each in sums))
