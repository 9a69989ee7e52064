"""The Accelerator of a run, checked against what the recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import get_available_trackers  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.processes import meet
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training.engines import deepspeed_config
from kpsvd_tune.training.progress import check_halving
from kpsvd_tune.training.schedule import check_optimizer


def make_accelerator(
    recipe: TrainRecipe,
    tracking: Sequence[str] = (),
    logging_dir: Path | None = None,
    init_method: str | None = None,
) -> Accelerator:
    """Make the Accelerator that `Training` expects, with trackers that write into `logging_dir`.

    `init_method` is where torch finds the other processes, if not by its environment. RecipeError:
    a tracker is not installed, or the device cannot do what the recipe asks, or the optimiser or
    the schedule it names cannot work.
    """
    for name in tracking:
        if name not in [str(tracker) for tracker in get_available_trackers()]:
            raise RecipeError(
                f"tracking: {name} is not installed; install it with `pip install {name}`, "
                "or take it off the list"
            )
    handlers: list[Any] = [
        # The frozen factors are buffers; they are equal everywhere and need no sending.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    ]
    if deepspeed_config.is_requested():
        deepspeed_config.prepare()
        if not torch.accelerator.is_available():
            # Accelerate knows no backend for DeepSpeed on CPUs.
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
    elif init_method is not None:
        handlers.append(InitProcessGroupKwargs(init_method=init_method))
    accelerator = _accelerator(
        mixed_precision=recipe.precision,
        log_with=list(tracking) or None,
        project_dir=logging_dir,
        # The loop accumulates. Given here, because an environment variable would win otherwise.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_with_dataloader=False
        ),
        kwargs_handlers=handlers,
    )
    check_optimizer(recipe, accelerator.num_processes)
    check_halving(recipe, accelerator.num_processes, deepspeed_config.is_requested())
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError("train.precision: fp16 needs a GPU; use bf16 or no on a CPU")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise RecipeError(
            "Accelerate's configuration asks for FSDP; expected plain processes (MULTI_GPU or "
            "MULTI_CPU): take it out of the configuration, and set train.parallel: fsdp to share "
            "out the weights"
        )
    deepspeed_config.check_parallel(accelerator, recipe)
    meet()
    return accelerator


def shares_weights(accelerator: Accelerator, recipe: TrainRecipe) -> bool:
    """Whether each process holds a part of every weight: fully_shard, or ZeRO 3."""
    is_fsdp = recipe.parallel == "fsdp" and accelerator.num_processes > 1
    return is_fsdp or deepspeed_config.zero_stage(accelerator) == 3


def _accelerator(**settings: Any) -> Accelerator:
    try:
        return Accelerator(**settings)
    except ValueError as error:
        if not deepspeed_config.is_requested():
            raise
        raise RecipeError(f"Accelerate refuses its own DeepSpeed settings: {error}") from error
