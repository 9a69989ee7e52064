"""The optimiser and the learning-rate schedule that a recipe names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, get_scheduler

from kpsvd_tune.recipe import TrainRecipe


def make_optimizer(
    recipe: TrainRecipe, parameters: Sequence[Tensor], rate_factors: Sequence[float] = ()
) -> torch.optim.Optimizer:
    """Make the optimiser of `train.optimizer` over all `parameters`.

    Args:
        recipe: Names the optimiser and its settings.
        parameters: What to train.
        rate_factors: What the learning rate of each parameter is multiplied with; empty: 1.
            Parameters of equal factor make a group, which knows it as ``rate_factor``.
    """
    return _make_optimizer(recipe, _groups(recipe, parameters, rate_factors))


def _groups(
    recipe: TrainRecipe, parameters: Sequence[Tensor], rate_factors: Sequence[float]
) -> list[dict[str, Any]]:
    factors = rate_factors or [1.0] * len(parameters)
    members: dict[float, list[Tensor]] = {}
    for parameter, factor in zip(parameters, factors, strict=True):
        members.setdefault(factor, []).append(parameter)
    return [
        {"params": group, "lr": recipe.learning_rate * factor, "rate_factor": factor}
        for factor, group in members.items()
    ]


def _make_optimizer(recipe: TrainRecipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adafactor":
        # Relative steps scale by a weight's size; offsets start at zero and would never leave it.
        return Adafactor(  # type: ignore[no-untyped-call]
            groups,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    # Hundreds of small tensors: one fused pass instead of ten operations for each.
    fused = all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point()
        for group in groups
        for p in group["params"]
    )
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused
    )


def make_scheduler(
    recipe: TrainRecipe, optimizer: torch.optim.Optimizer, num_steps: int
) -> LambdaLR:
    """Make the schedule of `train.scheduler`, to be stepped once an optimiser step.

    Transformers' warm-up starts at rate 0, so with a warm-up the first step changes nothing.
    """
    scheduler = get_scheduler(
        recipe.scheduler,
        optimizer,
        num_warmup_steps=math.ceil(recipe.warmup_ratio * num_steps),
        num_training_steps=num_steps,
    )
    if not isinstance(scheduler, LambdaLR):
        raise TypeError(f"{recipe.scheduler} is a {type(scheduler).__name__}; expected a LambdaLR")
    return scheduler
