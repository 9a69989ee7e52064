"""DeepSpeed's engine, driven one call at a time so that the loop's rules stay what they are.

The engine shards optimiser state (ZeRO 1), gradients (2) and weights (3). It sums gradients,
clips and steps; the loop decides whether a step is taken, moves the schedule, and keeps whole
tensors in its own checkpoints. DeepSpeed's own files are pickles; none is written or read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.hardware.heap import return_large_blocks
from kpsvd_tune.models.streamed import streamed_weights, to_be_filled
from kpsvd_tune.processes import gather_numbers
from kpsvd_tune.runs.state import check_groups
from kpsvd_tune.training.engines.deepspeed_config import engine_config
from kpsvd_tune.training.engines.plain import Engine
from kpsvd_tune.training.loss import SummedTokenLoss


class DeepSpeedEngine(Engine):
    """The loss in DeepSpeed's engine, with the optimiser's state sharded.

    The optimiser is an element-wise one over float32 parameters, sharded in place at stage 3.
    """

    keeps_gradients = False
    holds_weights = False  # not at stage 3

    def __init__(self, token_loss: SummedTokenLoss, *arguments: Any) -> None:
        super().__init__(token_loss, *arguments)
        import deepspeed

        _check_dtype(self._names)
        self._deepspeed = deepspeed
        given = self._accelerator.deepspeed_plugin.deepspeed_config
        config = engine_config(given, self._recipe, self._accelerator.num_processes)
        self.stage: int = config["zero_optimization"]["stage"]
        self._group_names = [
            [self._names[p] for p in each["params"]] for each in self.optimizer.param_groups
        ]
        # Only now, as it takes the parameters' data away at stage 3.
        if self.stage == 3:
            if self._accelerator.device.type == "cpu":
                return_large_blocks()
            # Weight by weight, for the engine would first put the whole base on every device.
            is_reader = self._accelerator.is_main_process
            filled = _Filled(self._module, token_loss.model, is_reader)
            deepspeed.zero.Init(module=filled, config_dict_or_path=config)
            self._module.to(self._accelerator.device)
            self._module.is_sharded = True  # type: ignore[assignment]
        self._engine: Any
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=self._module, optimizer=self.optimizer, config=config, dist_init_required=False
        )

    def _prepare(self, token_loss: SummedTokenLoss) -> nn.Module:
        # The optimiser keeps what is trained, so that must be here before.
        for _ in _fill(token_loss.model, is_reader=True, is_trained=True):
            pass
        if self._recipe.precision == "bf16":
            cast: Any = torch.autocast(self._accelerator.device.type, torch.bfloat16)
            token_loss.forward = cast(token_loss.forward)  # type: ignore[method-assign]
        return token_loss

    def backward(self, inputs: Mapping[str, Tensor], scale: float, is_last: bool) -> Tensor:
        """Compute the loss of a micro batch and add its gradient."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        summed: Tensor = self._engine(**inputs)
        self._engine.backward(summed * scale, scale_wrt_gas=False)
        return summed.detach()

    def clip(self) -> float:
        """The norm of the whole gradient; DeepSpeed's engine clips as it steps."""
        if self.stage == 0:
            gradients = [p.grad for p in self._names if p.grad is not None]
            return float(torch.nn.utils.get_total_norm(gradients))
        # Not the engine's own norm, which takes a group that is not finite for one of norm 1.
        parts = [part for group in self._zero.averaged_gradients.values() for part in group]
        own = sum(float(part.double().square().sum()) for part in parts)
        return math.sqrt(sum(each for (each,) in gather_numbers(self._accelerator, [own])))

    def step(self) -> None:
        """Clip, and move the weights."""
        self._engine.step()

    def skip(self) -> None:
        """Forget the gradient."""
        if self.stage == 0:
            self._engine.zero_grad()
            return
        # What the engine does where fp16 gradients overflow.
        self._zero.overflow = True
        try:
            self._engine.step()
        finally:
            self._zero.overflow = False

    def weights(self) -> dict[str, Tensor]:
        """Every trained tensor by name, whole."""
        if self.stage == 0:
            return super().weights()
        get = self._deepspeed.utils.safe_get_full_fp32_param
        return {name: get(parameter) for parameter, name in self._names.items()}

    def load_weights(self, values: Mapping[str, Tensor]) -> None:
        """Put back the trained tensors."""
        gathered = self._deepspeed.zero.GatheredParameters
        parameters = list(self._names)
        with torch.no_grad(), gathered(parameters, modifier_rank=0, enabled=self.stage == 3):
            for parameter, name in self._names.items():
                parameter.copy_(values[name])
        if self.stage > 0:
            # The optimiser moves copies of its own.
            for parameter, name in self._names.items():
                value = values[name].to(parameter.device)
                self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)

    def free(self) -> None:
        """Give back the buffers and the weights, to which DeepSpeed's hooks refer for ever."""
        self._engine.destroy()
        for parameter in self._module.parameters():
            for held in (parameter, getattr(parameter, "ds_tensor", None)):
                if held is not None:
                    held.data = torch.empty(0, dtype=held.dtype, device=held.device)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state as without DeepSpeed, tensors whole."""
        if self.stage == 0:
            return super().optimizer_state()
        groups = [
            {**group, "params": names}
            for group, names in zip(self.optimizer.param_groups, self._group_names, strict=True)
        ]
        state: dict[str, dict[str, Any]] = {}
        if any(self.optimizer.state.values()):
            self._link_state()
            get = self._deepspeed.utils.safe_get_full_optimizer_state
            # All parts have taken the same steps, so what is one number for a part holds for all.
            one: Mapping[str, Any] = self.optimizer.state[self._parts()[0]]
            for parameter, name in self._names.items():
                state[name] = {
                    key: get(parameter, key) if _is_per_entry(value) else _copy(value)
                    for key, value in one.items()
                }
        return {"state": state, "groups": groups}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Put back the state of each parameter."""
        if self.stage == 0:
            super().load_optimizer_state(state)
            return
        check_groups(state, self._group_names)
        values: Mapping[str, Mapping[str, Any]] = state["state"]
        self.optimizer.state.clear()
        one = next(iter(values.values()), {})
        for part in self._parts() if one else ():
            self.optimizer.state[part] = {
                key: torch.zeros_like(part) if _is_per_entry(value) else _copy(value, part.device)
                for key, value in one.items()
            }
        self._link_state()
        put = self._deepspeed.utils.safe_set_full_optimizer_state
        for parameter, name in self._names.items():
            for key, value in values.get(name, {}).items():
                if _is_per_entry(value):
                    put(parameter, value.to(parameter.device), key)

    def _link_state(self) -> None:
        """Let the engine look at the state that there is now.

        Below stage 3 it looks only once, after the first group's step, before others have any.
        """
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            if self.optimizer.state:
                self._zero._lazy_init_hp_params_optimizer_state()

    def _parts(self) -> list[Tensor]:
        """What the optimiser moves on this process: flat float32 tensors."""
        parts: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self._zero.single_partition_of_fp32_groups
        )
        return parts


class _Filled(nn.Module):
    """A module that reads its weights as they are asked for, and gives each of them once.

    `zero.Init` shares out one before it asks for the next.
    """

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,  # in it, with the base
        is_reader: bool,  # the others are sent what this process has read
    ) -> None:
        super().__init__()
        self.module = module
        self._filled = partial(_fill, model, is_reader=is_reader)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All parameters, each with its values."""
        yield from self._filled()
        yield from super().parameters(recurse)


@torch.no_grad()
def _fill(model: nn.Module, *, is_reader: bool, is_trained: bool = False) -> Iterator[nn.Parameter]:
    """Give values to the weights on the meta device, one after the other; or to the trained alone.

    A process that is no reader gets memory without values.
    """
    weights = streamed_weights(model)
    if weights is None:
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, places, held in to_be_filled(base):
        if is_trained and not held.requires_grad:
            continue
        if is_reader:
            value = weights.read(name).to(held.dtype)
        else:
            value = torch.empty(held.shape, dtype=held.dtype)
        filled = nn.Parameter(value, requires_grad=held.requires_grad)
        for module, key in places:
            module._parameters[key] = filled
        yield filled
    weights.close()


def _is_per_entry(value: Any) -> bool:
    """Whether an optimiser keeps such a value for each entry of a parameter."""
    return isinstance(value, Tensor) and value.ndim > 0


def _copy(value: Any, device: torch.device | None = None) -> Any:
    """A number or a tensor of its own: each part counts its steps by itself."""
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _check_dtype(names: Mapping[Tensor, str]) -> None:
    others = sorted({str(p.dtype) for p in names if p.dtype != torch.float32})
    if others:
        raise RecipeError(
            f"DeepSpeed needs float32 for all that is trained, got {' and '.join(others)} as well; "
            "set model.dtype: float32, or adapter.modules_to_save: []"
        )
