"""Whole weights on each process: one process, or several that sum gradients by torch's DDP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn

from kpsvd_tune.adapter.idle import trained_by_layer, unreached_layers
from kpsvd_tune.training.batches import MicroBatch
from kpsvd_tune.training.engines import Engine
from kpsvd_tune.training.loss import SummedTokenLoss, evaluating

# Experts that are layers of their own are called as the tokens of a step decide.
_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")


class PlainEngine(Engine):
    """Steps of torch's optimiser, with a gradient scaler where the recipe asks for fp16."""

    def _prepare(self, token_loss: SummedTokenLoss) -> nn.Module:
        if self._accelerator.num_processes > 1 and self._example is not None:
            allow_unused_parameters(token_loss, self._example, self._accelerator)
        module: nn.Module = self._accelerator.prepare_model(token_loss)
        return module

    def backward(self, inputs: Mapping[str, Tensor], scale: float, is_last: bool) -> Tensor:
        """Compute the loss of a micro batch and add its gradient."""
        with nullcontext() if is_last else self._accelerator.no_sync(self._module):
            summed: Tensor = self._module(**inputs)
            self._accelerator.backward(summed * scale)
        return summed.detach()

    def clip(self) -> float:
        """Clip the gradient; its norm before that."""
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        return float(torch.nn.utils.clip_grad_norm_(list(self._names), self._max_grad_norm))

    def step(self) -> None:
        """Move the weights, unless the loss scaler finds an overflow."""
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()

    def skip(self) -> None:
        """Leave the weights as they are."""
        if self._scaler is not None:
            self._scaler.update()


def allow_unused_parameters(
    token_loss: SummedTokenLoss, example: MicroBatch, accelerator: Accelerator
) -> None:
    """Make DDP look for parameters without gradients, where the example leaves some out.

    DDP otherwise waits for them for ever; looking costs time in each step. To be called before the
    model is prepared, with the same example on every process.
    """
    token_loss.to(accelerator.device)
    with evaluating(token_loss):  # draws no random numbers
        loss = token_loss(**example.to(accelerator.device))
    model = token_loss.model
    needs_looking = unreached_layers(model, loss) or any(
        map(_EXPERT.search, trained_by_layer(model))
    )
    accelerator.ddp_handler.find_unused_parameters = bool(needs_looking)
