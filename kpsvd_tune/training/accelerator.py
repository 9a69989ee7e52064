"""The Accelerator of a run, checked against what the recipe asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
from accelerate.tracking import get_available_trackers  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.hardware.devices import own_device, wants_cpu
from kpsvd_tune.processes import meet
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training.engines import deepspeed_config
from kpsvd_tune.training.progress import check_halving
from kpsvd_tune.training.schedule import check_optimizer

# Marks Accelerate's state of a process as made here.
_OURS = "made_by_kpsvd_tune"


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
    if group := _group(init_method):
        handlers.append(InitProcessGroupKwargs(**group))
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
    _check_device(recipe, accelerator)
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


def join(init_method: str | None = None) -> torch.device:
    """Let the processes of a run find each other, and give the device of this one.

    :func:`make_accelerator` does so too; this is for what must be known before it is called.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return own_device()
    place: torch.device = PartialState(cpu=wants_cpu(), **_group(init_method)).device
    return place


def _group(init_method: str | None) -> dict[str, Any]:
    """How the process group is made, where not as Accelerate does by itself."""
    if deepspeed_config.is_requested():
        deepspeed_config.prepare()
        # Accelerate knows no backend for DeepSpeed on CPUs.
        return {} if torch.accelerator.is_available() else {"backend": "gloo"}
    return {} if init_method is None else {"init_method": init_method}


def _let_go_of_precision(wanted: str) -> None:
    """Let a process train in one precision after another.

    Accelerate binds a process to the precision of its first Accelerator. One of an earlier run of
    ours is done with; one that somebody else made may be in use, and its precision stays.
    """
    held = AcceleratorState._shared_state
    # DeepSpeed keeps the precision in its own settings.
    if held.get("_mixed_precision", wanted) == wanted or deepspeed_config.is_requested():
        return
    if held.get(_OURS):
        AcceleratorState._reset_state()
        return
    raise RecipeError(
        f"train.precision is {wanted}, but this process has an Accelerator with mixed_precision="
        f"{held['_mixed_precision']!r}, and Accelerate allows one precision in a process; train in "
        "a process of its own, or set train.precision to that of the Accelerator"
    )


def _check_device(recipe: TrainRecipe, accelerator: Accelerator) -> None:
    """Refuse what the device cannot do."""
    kind = accelerator.device.type
    if recipe.precision == "fp16" and kind == "cpu":
        raise RecipeError("train.precision: fp16 needs a GPU; use bf16 or no on a CPU")
    if kind != "mps":
        return
    if recipe.precision == "fp16":
        raise RecipeError(
            'train.precision: fp16 is not supported on mps; expected "no", auto, or bf16, which '
            "has not been tried there"
        )
    if accelerator.num_processes > 1:
        raise RecipeError(
            f"{accelerator.num_processes} processes cannot share Apple's mps; train with one "
            "process, or on the CPU with --processes"
        )


def _accelerator(**settings: Any) -> Accelerator:
    _let_go_of_precision(settings["mixed_precision"])
    is_first = not AcceleratorState._shared_state
    try:
        accelerator = Accelerator(**settings)
        if is_first:
            setattr(accelerator.state, _OURS, True)
        return accelerator
    except ValueError as error:
        if not deepspeed_config.is_requested():
            raise
        raise RecipeError(f"Accelerate refuses its own DeepSpeed settings: {error}") from error
