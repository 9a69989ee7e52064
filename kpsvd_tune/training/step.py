"""One optimiser step: forward and backward over its micro batches, the checks, the update."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn

from kpsvd_tune.errors import AdapterError, CheckpointError
from kpsvd_tune.processes import gather_numbers
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.runs.state import load_optimizer_state, optimizer_state
from kpsvd_tune.storage.memory import is_out_of_memory, out_of_memory
from kpsvd_tune.training.batches import MicroBatch
from kpsvd_tune.training.engines.deepspeed import ZeroEngine
from kpsvd_tune.training.engines.deepspeed_config import zero_stage
from kpsvd_tune.training.engines.sharded import (
    check_shardable,
    copy_into,
    is_sharded,
    number,
    parts_of_state,
    shard,
    sum_gradients,
    whole,
)
from kpsvd_tune.training.idle import warn_of_idle_layers
from kpsvd_tune.training.loss import SummedTokenLoss
from kpsvd_tune.training.optim import make_optimizer
from kpsvd_tune.training.recovery import MicroStepOutOfMemory, find_fault
from kpsvd_tune.training.schedule import make_scheduler


@dataclass(frozen=True)
class StepSums:
    """What one step amounted to, over all processes and equal on each.

    Attributes:
        loss: Summed over supervised tokens, in nats.
        num_supervised: Those tokens.
        num_tokens: All tokens but padding.
        learning_rate: The rate of this step.
        grad_norm: Global norm of the gradient before clipping.
        signal: Number of a signal that came to any process, 0 for none.
        fault: What was not finite, for which reason no weight was moved; None for a step taken.
    """

    loss: float
    num_supervised: float
    num_tokens: int
    learning_rate: float
    grad_norm: float
    signal: int
    fault: str | None


class Stepper:
    """The model with its loss, its optimiser and its schedule, moved together by `take`.

    Args:
        model: Goes to the accelerator's device.
        recipe: The `train` section.
        accelerator: The processes.
        num_steps: Length of the schedule.
        rate_factors: Parameter name to what its learning rate is multiplied with; 1 elsewhere.

    Raises:
        AdapterError: Nothing is trainable.
        RecipeError: The recipe shares out weights (fsdp) and asks for what cannot be done then.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: TrainRecipe,
        accelerator: Accelerator,
        num_steps: int,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._max_grad_norm = recipe.max_grad_norm or math.inf
        self._halves = recipe.on_oom == "halve"
        self.token_loss = SummedTokenLoss(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise AdapterError("the model has no trainable parameter; expected an adapter on it")
        if recipe.gradient_checkpointing:
            _enable_checkpointing(model)
        if recipe.parallel == "fsdp" and accelerator.num_processes > 1:
            check_shardable(model, recipe)
            shard(self.token_loss, model, accelerator)
        self.is_sharded = is_sharded(self.token_loss)
        is_zero = zero_stage(accelerator) is not None
        self._module: nn.Module = self.token_loss
        if not is_zero:
            # What is sharded already is not wrapped by DDP; precision is set up either way.
            self._module = accelerator.prepare_model(self._module, evaluation_mode=self.is_sharded)
        self.names: dict[Tensor, str] = {
            p: name for name, p in model.named_parameters() if p.requires_grad
        }
        factors = rate_factors or {}
        self._optimizer = make_optimizer(
            recipe, list(self.names), [factors.get(name, 1.0) for name in self.names.values()]
        )
        self._recipe, self._num_steps, self._starts_at_zero = recipe, num_steps, False
        self._scheduler = make_scheduler(recipe, self._optimizer, num_steps)
        self._base_rates = list(self._scheduler.base_lrs)
        self._shapes = {name: tuple(parameter.shape) for parameter, name in self.names.items()}
        self.num_trained = sum(parameter.numel() for parameter in self.names)
        # Last, as it may take the parameters' data away.
        self._zero: ZeroEngine | None = None
        if is_zero:
            self._zero = ZeroEngine(self._module, self._optimizer, self.names, recipe, accelerator)

    def take(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        rows_of: Callable[[int], Sequence[int]],
        signal: Callable[[], int],
    ) -> StepSums:
        """Move the weights once, unless a loss or the gradient is not finite.

        Args:
            step: Number of the step, from 1.
            batches: This process's micro batches.
            rows_of: Row numbers of the step on one process, for messages.
            signal: The number of a signal that came to this process, or 0.

        Returns:
            Sums that are equal on all processes; a `fault` in them says that no weight has moved.
        """
        accelerator = self._accelerator
        own = sum(batch.num_supervised for batch in batches)
        num_supervised = sum(each for (each,) in gather_numbers(accelerator, [own]))
        # DDP takes the mean of the processes' gradients, where the loss is a sum over them.
        scale = accelerator.num_processes / max(1.0, num_supervised)
        with self._gradients_dropped_without_memory(step):
            loss = self._accumulate(batches, scale)
        if step == 1 and self._zero is None:
            warn_of_idle_layers(self.token_loss.model, accelerator)
        grad_norm = self._clip()
        sums = [loss.item(), sum(batch.num_tokens for batch in batches), signal()]
        losses, num_tokens, signals = zip(*gather_numbers(accelerator, sums), strict=True)
        scaler = accelerator.scaler
        # An infinite gradient tells a loss scaler to scale less; only at its floor it is a fault.
        is_judged = scaler is None or scaler.get_scale() <= 1
        fault = find_fault(step, losses, grad_norm if is_judged else None, rows_of)
        group = self._optimizer.param_groups[0]
        learning_rate = group["lr"] / group["rate_factor"]
        if self._zero is not None:
            if fault is None:
                self._zero.step()
            else:
                self._zero.discard()
        elif scaler is not None:
            if fault is None:
                scaler.step(self._optimizer)
            scaler.update()
        elif fault is None:
            self._optimizer.step()
        with warnings.catch_warnings():
            if fault is not None:
                # Of torch, where no step was ever taken before the schedule moves.
                warnings.simplefilter("ignore", UserWarning)
            # Ours to call, once: Accelerate's own scheduler steps once for each process.
            self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepSums(
            loss=sum(losses),
            num_supervised=num_supervised,
            num_tokens=int(sum(num_tokens)),
            learning_rate=float(learning_rate),
            grad_norm=grad_norm,
            signal=int(max(signals)),
            fault=fault,
        )

    def _accumulate(self, batches: Sequence[MicroBatch], scale: float) -> Tensor:
        """Forward and backward over the micro batches; the summed loss of this process."""
        accelerator = self._accelerator
        loss = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            if self._zero is not None:
                loss += self._zero.backward(batch.to(accelerator.device), scale, is_last)
                continue
            # Gradients travel once a step, with the last micro batch.
            if self.is_sharded:
                sum_gradients(self.token_loss, is_last)
            with nullcontext() if is_last else accelerator.no_sync(self._module):
                summed = self._module(**batch.to(accelerator.device))
                accelerator.backward(summed * scale)
            loss += summed.detach()
        return loss

    @contextmanager
    def _gradients_dropped_without_memory(self, step: int) -> Iterator[None]:
        """With `train.on_oom: halve`, leave a step that found no memory as if never begun."""
        refusal = None
        try:
            yield
        except Exception as error:
            if not (self._halves and is_out_of_memory(error)):
                raise
            refusal = out_of_memory(error, f"computing step {step}", ())
        if refusal is not None:
            self._optimizer.zero_grad(set_to_none=True)
            raise MicroStepOutOfMemory(str(refusal))

    def devices(self) -> list[torch.device]:
        """The devices that hold parts of the model."""
        return sorted({p.device for p in self.token_loss.parameters()}, key=str)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: `offsets`, `optimizer`, `scheduler`; tensors not copied.

        All processes must ask, for what is shared out is put together.
        """
        scaler = self._accelerator.scaler
        return {
            "offsets": self.trained_weights(),
            "optimizer": (
                whole(optimizer_state(self._optimizer, self.names))
                if self._zero is None
                else self._zero.optimizer_state()
            ),
            "scheduler": {
                "schedule": self._scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "starts_at_zero": self._starts_at_zero,
            },
        }

    def trained_weights(self) -> dict[str, Tensor]:
        """Every trained tensor by name, whole; all processes must ask."""
        if self._zero is not None:
            return self._zero.weights()
        return {name: whole(parameter.detach()) for parameter, name in self.names.items()}

    def load_state(
        self,
        offsets: dict[str, Tensor],
        optimizer: dict[str, Any] | None,
        scheduler: dict[str, Any],
        rate_factor: float,
    ) -> None:
        """Put back what `state` gave, with the recipe's learning rate times `rate_factor`.

        Settings (rates, decay) are the recipe's: equal to the saved ones unless the user allowed
        a change, which then counts from here on. Without a state the optimiser is left as it is.

        Raises:
            CheckpointError: The checkpoint is of another model or adapter.
        """
        own = {name: parameter for parameter, name in self.names.items()}
        self._check_weights(offsets)
        # A checkpoint that says nothing of it is of a version whose warm-up began at rate 0, and
        # its run goes on under that schedule.
        self._starts_at_zero = scheduler.get("starts_at_zero", True)
        if self._starts_at_zero:
            self._scheduler = make_scheduler(
                self._recipe, self._optimizer, self._num_steps, starts_at_zero=True
            )
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        self._copy_weights(offsets)
        if optimizer is not None and self._zero is not None:
            self._zero.load_optimizer_state(optimizer)
        elif optimizer is not None:
            parts = {**optimizer, "state": parts_of_state(optimizer["state"], own)}
            load_optimizer_state(self._optimizer, parts, self.names)
        base_rates = [rate * rate_factor for rate in self._base_rates]
        schedule = {**scheduler["schedule"], "base_lrs": base_rates}
        self._scheduler.load_state_dict(schedule)
        rates = [
            base * factor(self._scheduler.last_epoch)
            for base, factor in zip(
                self._scheduler.base_lrs, self._scheduler.lr_lambdas, strict=True
            )
        ]
        groups = zip(self._optimizer.param_groups, settings, rates, strict=True)
        for group, values, rate in groups:
            group.update(values, lr=rate)
        self._scheduler._last_lr = rates
        if self._accelerator.scaler is not None and scheduler["scaler"]:
            self._accelerator.scaler.load_state_dict(scheduler["scaler"])

    def load_weights(self, offsets: Mapping[str, Tensor]) -> None:
        """Put back trained tensors by name, whole, and nothing else; all processes must ask.

        Raises:
            CheckpointError: They are of another model or adapter.
        """
        self._check_weights(offsets)
        self._copy_weights(offsets)

    def _check_weights(self, offsets: Mapping[str, Tensor]) -> None:
        if found := _difference(self._shapes, offsets):
            raise CheckpointError(f"the checkpoint does not fit the model: {found}")

    def _copy_weights(self, offsets: Mapping[str, Tensor]) -> None:
        if self._zero is not None:
            self._zero.load_weights(offsets)
            return
        for parameter, name in self.names.items():
            copy_into(parameter, offsets[name])

    def _clip(self) -> float:
        if self._zero is not None:
            # The engine clips as it steps.
            return self._zero.grad_norm()
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.unscale_(self._optimizer)
        return number(torch.nn.utils.clip_grad_norm_(list(self.names), self._max_grad_norm))


def _enable_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, in torch's non-reentrant way.

    That way needs no input that requires a gradient, which a frozen embedding would not give.
    """
    options = {"use_reentrant": False}
    # Transformers 5.23 renamed the method, and warns at the old name.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs=options
        )


def _difference(own: Mapping[str, tuple[int, ...]], saved: Mapping[str, Tensor]) -> str:
    """The first few differences between names and shapes, empty when there is none."""
    found = [f"{name} is missing" for name in own if name not in saved]
    found += [f"{name} is unknown" for name in saved if name not in own]
    found += [
        f"{name} is {tuple(saved[name].shape)}, expected {shape}"
        for name, shape in own.items()
        if name in saved and tuple(saved[name].shape) != shape
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more
