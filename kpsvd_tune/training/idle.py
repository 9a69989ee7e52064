"""Layers that training does not reach: named in the first step, and waited for by no process."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn

from kpsvd_tune.adapter.idle import (
    idle_layers,
    idle_message,
    trained_by_layer,
    unreached_layers,
)
from kpsvd_tune.data import IGNORED, TokenizedRow
from kpsvd_tune.training.batches import MicroBatch
from kpsvd_tune.training.loss import SummedTokenLoss

_log = logging.getLogger(__name__)

# Enough to reach all that any text reaches.
_PROBE_TOKENS = 16
# Experts that are layers of their own are called as the tokens of a step decide.
_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")


def allow_unused_parameters(
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    make_batch: Callable[[list[TokenizedRow]], MicroBatch],
    accelerator: Accelerator,
) -> None:
    """Make DDP look for parameters without gradients, where the start of a row leaves some out.

    DDP otherwise waits for them for ever, and ends in an error; looking costs time in each step.
    To be called before the model is prepared; it goes to the accelerator's device.

    Args:
        model: The model, with what is trained in it.
        rows: The training rows, the same on every process.
        make_batch: Makes a micro batch of rows.
        accelerator: The processes.
    """
    if accelerator.ddp_handler is None or not rows:
        return
    ids = rows[0].input_ids[:_PROBE_TOKENS]
    row = TokenizedRow(ids, [IGNORED, *ids[1:]], rows[0].row)
    model.to(accelerator.device)
    was_training = model.training
    model.eval()  # draws no random numbers
    loss = SummedTokenLoss(model)(**make_batch([row]).to(accelerator.device))
    model.train(was_training)
    needs_looking = unreached_layers(model, loss) or any(
        map(_EXPERT.search, trained_by_layer(model))
    )
    accelerator.ddp_handler.find_unused_parameters = bool(needs_looking)


def warn_of_idle_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Name the layers without gradients, on the first process; to be called before they are reset.

    Args:
        model: The model.
        accelerator: The processes.
    """
    if accelerator.is_main_process and (idle := idle_layers(model)):
        _log.warning(idle_message(idle, list(trained_by_layer(model))))
