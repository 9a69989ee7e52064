"""Accelerate, set up for this loop, and what the processes of a run do together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import get_available_trackers  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    broadcast_object_list,
)

from kpsvd_tune.errors import KpsvdTuneError, RecipeError, RunError
from kpsvd_tune.recipe import TrainRecipe

T = TypeVar("T")


def make_accelerator(
    recipe: TrainRecipe, tracking: Sequence[str] = (), logging_dir: Path | None = None
) -> Accelerator:
    """Make the Accelerator that `Training` expects.

    Args:
        recipe: Its precision and its way of sharing work.
        tracking: Names of trackers.
        logging_dir: Where trackers that write files put them.

    Raises:
        RecipeError: A tracker is not installed, or the device cannot do what the recipe asks.
    """
    for name in tracking:
        if name not in [str(tracker) for tracker in get_available_trackers()]:
            raise RecipeError(
                f"tracking: {name} is not installed; install it with `pip install {name}`, "
                "or take it off the list"
            )
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        log_with=list(tracking) or None,
        project_dir=logging_dir,
        # Given outright, as an environment variable would otherwise win: the loop accumulates.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            # The frozen factors are buffers; they are equal everywhere and need no sending.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError("train.precision: fp16 needs a GPU; use bf16 or no on a CPU")
    return accelerator


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run `function` on the main process while the others wait; all get its result or its error.

    Args:
        accelerator: The processes.
        function: Called once; its result must be picklable.

    Raises:
        KpsvdTuneError: What `function` raised, on every process alike, so that none waits for
            one that has gone; other exceptions become a RunError on the others.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except KpsvdTuneError as error:
            outcome[1] = error
        except Exception as error:
            outcome[1] = RunError(f"the main process failed: {type(error).__name__}: {error}")
            broadcast_object_list(outcome)
            raise
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def gather_numbers(accelerator: Accelerator, numbers: Sequence[float]) -> list[list[float]]:
    """The numbers of every process, in the order of processes; one wait for the device."""
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    own = torch.tensor([numbers], dtype=dtype, device=accelerator.device)
    rows: list[list[float]] = accelerator.gather(own).tolist()
    return rows


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process held: of the device, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if find_spec("resource") is None:
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes where Linux counts kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024
