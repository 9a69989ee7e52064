"""The optimiser and the learning-rate schedule that a recipe names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, get_scheduler

from kpsvd_tune.recipe import TrainRecipe


def make_optimizer(recipe: TrainRecipe, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Make the optimiser of `train.optimizer` over all `parameters`, in one group."""
    if recipe.optimizer == "adafactor":
        # Relative steps scale by a weight's size; offsets start at zero and would never leave it.
        return Adafactor(  # type: ignore[no-untyped-call]
            parameters,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
    # Hundreds of small tensors: one fused pass instead of ten operations for each.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused
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
