"""Whole weights on each process: one process, or several that sum gradients by torch's DDP."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn

from kpsvd_tune.adapter.idle import trained_by_layer, unreached_layers
from kpsvd_tune.models.offload import is_offloaded
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.runs.state import load_optimizer_state, optimizer_state
from kpsvd_tune.training.batches import MicroBatch
from kpsvd_tune.training.loss import SummedTokenLoss, evaluating
from kpsvd_tune.training.optim import make_optimizer

# Names of experts that are layers of their own: a step's tokens decide which of them are called.
_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")


class Engine:
    """A model with its loss and its optimiser, on one or several processes.

    Each method is called on all processes at the same time, and gives equal results on all unless
    it says otherwise. Engines that share the work in another way override what differs.
    RecipeError: the recipe asks for what the engine cannot do.
    """

    keeps_gradients = True  # whether parameters hold their gradients after the backward pass
    holds_weights = True  # whether each process holds every trained tensor whole

    def __init__(
        self,
        token_loss: SummedTokenLoss,  # goes to the accelerator's device
        recipe: TrainRecipe,
        accelerator: Accelerator,  # from `make_accelerator`, with the same section
        rate_factors: Mapping[str, float],  # of learning rates, by parameter; 1 elsewhere
        # A batch that uses every weight that text can use, the same on every process.
        example: MicroBatch | None = None,
    ) -> None:
        self._accelerator, self._recipe, self._example = accelerator, recipe, example
        self._scaler: torch.amp.GradScaler | None = accelerator.scaler
        self._max_grad_norm = recipe.max_grad_norm or math.inf
        self._module = self._prepare(token_loss)
        self._names: dict[Tensor, str] = {
            p: name for name, p in token_loss.model.named_parameters() if p.requires_grad
        }
        # Of each trained parameter, by its name in the model.
        self.shapes = {name: tuple(parameter.shape) for parameter, name in self._names.items()}
        factors = [rate_factors.get(name, 1.0) for name in self.shapes]
        # The schedule sets its groups' rates.
        self.optimizer = make_optimizer(recipe, list(self._names), factors)

    def _prepare(self, token_loss: SummedTokenLoss) -> nn.Module:
        """What is called in training: the loss on its device, wrapped or sharded."""
        if self._accelerator.num_processes > 1 and self._example is not None:
            allow_unused_parameters(token_loss, self._example, self._accelerator)
        stays = is_offloaded(token_loss)
        module: nn.Module = self._accelerator.prepare_model(
            token_loss, device_placement=False if stays else None
        )
        return module

    def backward(self, inputs: Mapping[str, Tensor], scale: float, is_last: bool) -> Tensor:
        """Add a micro batch's gradient, times `scale`, and give its loss of this process.

        The loss is summed and not scaled, a float32 scalar. `is_last` is the last micro batch of a
        step, with which gradients are summed over processes.
        """
        with nullcontext() if is_last else self._accelerator.no_sync(self._module):
            summed: Tensor = self._module(**inputs)
            self._accelerator.backward(summed * scale)
        return summed.detach()

    def divide(self, number: float) -> None:
        """Divide the gradient that a step has added up, before it is clipped."""
        for parameter in self._names:
            if parameter.grad is not None:
                parameter.grad /= number

    def clip(self) -> float:
        """Clip the gradient as the recipe says; its norm before that."""
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        return float(torch.nn.utils.clip_grad_norm_(list(self._names), self._max_grad_norm))

    @property
    def may_overflow(self) -> bool:
        """Whether an infinite gradient only tells a loss scaler to scale less."""
        return self._scaler is not None and self._scaler.get_scale() > 1

    def step(self) -> None:
        """Move the weights, unless the loss scaler finds an overflow."""
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()

    def skip(self) -> None:
        """Leave the weights as they are in this step."""
        if self._scaler is not None:
            self._scaler.update()

    def weights(self) -> dict[str, Tensor]:
        """Every trained tensor by name, whole; not copied where a process holds it whole."""
        return {name: parameter.detach() for parameter, name in self._names.items()}

    def load_weights(self, values: Mapping[str, Tensor]) -> None:
        """Put back whole tensors, equal on all processes."""
        with torch.no_grad():
            for parameter, name in self._names.items():
                parameter.copy_(values[name])

    def free(self) -> None:
        """Give back memory that would outlive the last reference; nothing is called afterwards."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state in the form of `runs.state.optimizer_state`, tensors whole."""
        return optimizer_state(self.optimizer, self._names)

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Put back the state of each parameter; settings of groups stay as the recipe has them."""
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        load_optimizer_state(self.optimizer, state, self._names)
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)

    def scaler_state(self) -> dict[str, Any] | None:
        """The state of the loss scaler; None where there is none."""
        return None if self._scaler is None else self._scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Put it back."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)


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
