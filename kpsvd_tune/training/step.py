"""One optimiser step: forward and backward over its micro batches, the checks, the update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn

from kpsvd_tune.adapter.idle import idle_layers
from kpsvd_tune.errors import AdapterError, CheckpointError
from kpsvd_tune.processes import gather_numbers
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.runs.state import load_random_state, random_state
from kpsvd_tune.training.batches import MicroBatch
from kpsvd_tune.training.engines.deepspeed import DeepSpeedEngine
from kpsvd_tune.training.engines.deepspeed_config import zero_stage
from kpsvd_tune.training.engines.plain import Engine
from kpsvd_tune.training.engines.sharded import ShardedEngine
from kpsvd_tune.training.loss import SummedTokenLoss
from kpsvd_tune.training.progress import MicroStepOutOfMemory, find_fault, memory_refused
from kpsvd_tune.training.schedule import make_scheduler, set_rates


@dataclass(frozen=True)
class StepSums:
    """What one step amounted to, over all processes and equal on each."""

    loss: float  # summed over supervised tokens, in nats
    num_supervised: float  # those tokens
    num_tokens: int  # all but padding
    learning_rate: float
    grad_norm: float  # global norm before clipping
    signal: int  # one that came to any process, 0 for none
    fault: str | None  # what was not finite, so that no weight moved
    idle: tuple[str, ...] = ()  # adapted layers without a gradient; first step and main process


class Stepper:
    """The model with its loss, its optimiser and its schedule, moved together by `take`.

    The arguments are those of `Engine`, and the length of the schedule in steps. AdapterError:
    nothing is trainable; RecipeError: the recipe asks for what the engine cannot do.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: TrainRecipe,
        accelerator: Accelerator,
        num_steps: int,
        rate_factors: Mapping[str, float] | None = None,
        example: MicroBatch | None = None,
    ) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise AdapterError("the model has no trainable parameter; expected an adapter on it")
        if recipe.gradient_checkpointing:
            enable_checkpointing(model)
        self._recipe, self._accelerator, self._num_steps = recipe, accelerator, num_steps
        self.token_loss = SummedTokenLoss(model)  # not wrapped for several processes
        engine: type[Engine] = Engine
        if zero_stage(accelerator) is not None:
            engine = DeepSpeedEngine
        elif recipe.parallel == "fsdp" and accelerator.num_processes > 1:
            engine = ShardedEngine
        self._engine = engine(self.token_loss, recipe, accelerator, rate_factors or {}, example)
        self.shapes = self._engine.shapes  # of each trained parameter, by its name in the model
        self._divides_later = self._engine.keeps_gradients and _loses_small_gradients(
            model, accelerator
        )
        self._schedule_from(starts_at_zero=False)
        self._base_rates = list(self._scheduler.base_lrs)

    def take(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        rows_of: Callable[[int], Sequence[int]],
        signal: Callable[[], int],
    ) -> StepSums:
        """Move the weights once, unless a loss or the gradient is not finite; `step` counts from 1.

        `rows_of` names the rows on one process for messages; `signal` gives this process's or 0.
        The sums are equal on all processes; a `fault` in them says that no weight has moved. Raises
        MicroStepOutOfMemory, with nothing changed, where `train.on_oom` is halve.
        """
        engine, accelerator = self._engine, self._accelerator
        own = sum(batch.num_supervised for batch in batches)
        num_supervised = sum(each for (each,) in gather_numbers(accelerator, [own]))
        random = random_state(self.devices()) if self._recipe.on_oom == "halve" else {}
        try:
            with memory_refused(self._recipe, f"computing step {step}"):
                loss = self._accumulate(batches, max(1.0, num_supervised))
        except MicroStepOutOfMemory:
            # Where memory runs out may differ from one session to the next; what the step draws
            # must not, so it is left as if it had not begun.
            engine.optimizer.zero_grad(set_to_none=True)
            load_random_state(random)
            raise
        # They are found by their missing gradients, so before gradients are reset.
        is_looked_at = step == 1 and engine.keeps_gradients and accelerator.is_main_process
        idle = tuple(idle_layers(self.token_loss.model)) if is_looked_at else ()
        grad_norm = engine.clip()
        sums = [loss.item(), sum(batch.num_tokens for batch in batches), signal()]
        losses, num_tokens, signals = zip(*gather_numbers(accelerator, sums), strict=True)
        fault = find_fault(step, losses, None if engine.may_overflow else grad_norm, rows_of)
        group = engine.optimizer.param_groups[0]
        learning_rate = group["lr"] / group["rate_factor"]
        if fault is None:
            engine.step()
        else:
            engine.skip()
        with warnings.catch_warnings():
            if fault is not None:
                # torch warns where the schedule moves before any step was taken.
                warnings.simplefilter("ignore", UserWarning)
            # Called once here: Accelerate's own scheduler steps once for each process.
            self._scheduler.step()
        engine.optimizer.zero_grad(set_to_none=True)
        return StepSums(
            loss=sum(losses),
            num_supervised=num_supervised,
            num_tokens=int(sum(num_tokens)),
            learning_rate=float(learning_rate),
            grad_norm=grad_norm,
            signal=int(max(signals)),
            fault=fault,
            idle=idle,
        )

    def _accumulate(self, batches: Sequence[MicroBatch], num_tokens: float) -> Tensor:
        """Forward and backward over the micro batches; the summed loss of this process.

        The gradient is that of the loss of a token, of which all processes have `num_tokens`.
        """
        engine, device = self._engine, self._accelerator.device
        # DDP takes the mean of the processes' gradients, where the loss is a sum over them.
        scale = self._accelerator.num_processes / (1.0 if self._divides_later else num_tokens)
        loss = torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            loss += engine.backward(batch.to(device), scale, is_last)
        if self._divides_later:
            engine.divide(num_tokens)
        return loss

    def devices(self) -> list[torch.device]:
        """The devices that hold parts of the model."""
        return sorted({p.device for p in self.token_loss.parameters()}, key=str)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: `offsets`, `optimizer`, `scheduler`; tensors not copied.

        All processes must ask, for sharded tensors are gathered.
        """
        return {
            "offsets": self.trained_weights(),
            "optimizer": self._engine.optimizer_state(),
            "scheduler": {
                "schedule": self._scheduler.state_dict(),
                "scaler": self._engine.scaler_state(),
                "starts_at_zero": self._starts_at_zero,
            },
        }

    @property
    def holds_weights(self) -> bool:
        """Whether each process holds every trained tensor whole."""
        return self._engine.holds_weights

    def trained_weights(self) -> dict[str, Tensor]:
        """Every trained tensor by name, whole; all processes must ask."""
        return self._engine.weights()

    def free(self) -> None:
        """Give back the engine's memory; no step follows."""
        self._engine.free()

    def load_state(
        self,
        offsets: Mapping[str, Tensor],
        optimizer: Mapping[str, Any] | None,
        scheduler: Mapping[str, Any],
        rate_factor: float,
    ) -> None:
        """Put back what `state` gave, with the recipe's learning rate times `rate_factor`.

        Rates and decay are the recipe's: a change that the user allowed counts from here on.
        Without a state the optimiser is left as it is. CheckpointError: it is of another model.
        """
        self.load_weights(offsets)
        # A checkpoint that says nothing of it is of a version whose warm-up began at rate 0, and
        # its run goes on under that schedule.
        if scheduler.get("starts_at_zero", True):
            self._schedule_from(starts_at_zero=True)
        if optimizer is not None:
            self._engine.load_optimizer_state(optimizer)
        base_rates = [rate * rate_factor for rate in self._base_rates]
        self._scheduler.load_state_dict({**scheduler["schedule"], "base_lrs": base_rates})
        set_rates(self._scheduler)
        self._engine.load_scaler_state(scheduler["scaler"])

    def load_weights(self, offsets: Mapping[str, Tensor]) -> None:
        """Put back trained tensors by name, whole, and nothing else; all processes must ask."""
        if found := _difference(self.shapes, offsets):
            raise CheckpointError(f"the checkpoint does not fit the model: {found}")
        self._engine.load_weights(offsets)

    def _schedule_from(self, *, starts_at_zero: bool) -> None:
        self._starts_at_zero = starts_at_zero
        self._scheduler = make_scheduler(
            self._recipe, self._engine.optimizer, self._num_steps, starts_at_zero=starts_at_zero
        )


def _loses_small_gradients(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether gradients pass through float16, whose least number is 6e-8, with no loss scaler.

    A token's share of the mean over a step's 10,000 is near that; its share of the sum is not, and
    the factors, which are float32, can be divided as well.
    """
    return accelerator.scaler is None and any(
        parameter.dtype == torch.float16 for parameter in model.parameters()
    )


def enable_checkpointing(model: nn.Module) -> None:
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
