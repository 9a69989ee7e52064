"""Accelerate, set up for this loop, and what the processes of a run do together."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import PartialState  # type: ignore[import-untyped]
from accelerate.tracking import get_available_trackers  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from kpsvd_tune.errors import KpsvdTuneError, RecipeError, RunError
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training import zero_config
from kpsvd_tune.training.halving import check_halving
from kpsvd_tune.training.optim import check_optimizer

T = TypeVar("T")

# Longer than any work that one process does for all: a big base decomposed, a big corpus read.
_PATIENCE = timedelta(days=30)
# What gloo and NCCL say when the other end of a connection is gone; neither has a type for it.
_LOST = ("connection closed", "connection reset", "broken pipe", "socket", "remote process exited")
# The group that waits with that patience; None until there are several processes.
_patient_group: dist.ProcessGroup | None = None


def make_accelerator(
    recipe: TrainRecipe,
    tracking: Sequence[str] = (),
    logging_dir: Path | None = None,
    init_method: str | None = None,
) -> Accelerator:
    """Make the Accelerator that `Training` expects.

    Args:
        recipe: Its precision and its way of sharing work.
        tracking: Names of trackers.
        logging_dir: Where trackers that write files put them.
        init_method: Where torch finds the other processes, if not by its environment.

    Raises:
        RecipeError: A tracker is not installed, or the device cannot do what the recipe asks, or
            the optimiser or the schedule it names cannot work.
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
    if zero_config.is_requested():
        zero_config.prepare()
        if not torch.accelerator.is_available():
            # Accelerate knows no backend for DeepSpeed on CPUs.
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
    elif init_method is not None:
        handlers.append(InitProcessGroupKwargs(init_method=init_method))
    accelerator = _accelerator(
        mixed_precision=recipe.precision,
        log_with=list(tracking) or None,
        project_dir=logging_dir,
        # Given outright, as an environment variable would otherwise win: the loop accumulates.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_with_dataloader=False
        ),
        kwargs_handlers=handlers,
    )
    check_optimizer(recipe, accelerator.num_processes)
    check_halving(recipe, accelerator.num_processes, zero_config.is_requested())
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError("train.precision: fp16 needs a GPU; use bf16 or no on a CPU")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise RecipeError(
            "Accelerate's configuration asks for FSDP; expected plain processes (MULTI_GPU or "
            "MULTI_CPU): take it out of the configuration, and set train.parallel: fsdp to share "
            "out the weights"
        )
    zero_config.check_parallel(accelerator, recipe)
    global _patient_group
    if dist.is_available() and dist.is_initialized() and _patient_group is None:
        # Made while all processes are here, for making it is a meeting with a time limit.
        _patient_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return accelerator


def _accelerator(**settings: Any) -> Accelerator:
    try:
        return Accelerator(**settings)
    except ValueError as error:
        if not zero_config.is_requested():
            raise
        raise RecipeError(f"Accelerate refuses its own DeepSpeed settings: {error}") from error


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run `function` on the main process while the others wait; all get its result or its error.

    The others wait without a time limit, and notice at once when the main process dies.

    Args:
        accelerator: The processes.
        function: Called once; its result must be picklable.

    Raises:
        KpsvdTuneError: What `function` raised, on every process alike, so that none waits for
            one that has gone; other exceptions become a RunError on the others.
    """
    if accelerator.num_processes == 1:
        return function()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except KpsvdTuneError as error:
            outcome[1] = error
        except Exception as error:
            outcome[1] = RunError(f"the main process failed: {type(error).__name__}: {error}")
            dist.broadcast_object_list(outcome, src=0, group=_patient_group)
            raise
    dist.broadcast_object_list(outcome, src=0, group=_patient_group)
    if outcome[1] is not None:
        outcome[1].is_everywhere = True
        raise outcome[1]
    result: T = outcome[0]
    return result


def end_processes() -> None:
    """Take leave of the other processes; does nothing where there are none.

    Without it the threads of a process group outlive Python, and ending them by force may end the
    program with SIGABRT after all its work is done.
    """
    global _patient_group
    _patient_group = None
    if dist.is_available() and dist.is_initialized():
        # A gloo thread needs the interpreter to put its last piece of work away, and DDP, which may
        # be the last to hold the group, waits for that thread without letting it (torch 2.13).
        time.sleep(0.1)
        PartialState().destroy_process_group()


@contextlib.contextmanager
def name_lost_process(phase: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a collective whose partner died into a message with rank and phase.

    Args:
        phase: Asked for what this process was doing.

    Raises:
        RunError: The connection to another process broke.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        reason = str(error).splitlines()[0]
        raise RunError(
            f"rank {dist.get_rank()} lost the connection to another rank, which has died, while "
            f"{phase()} ({reason}). The last checkpoint is whole; the same command goes on from it"
        ) from error


def is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    words = str(error).lower()
    is_together = dist.is_available() and dist.is_initialized()
    return is_together and any(each in words for each in _LOST)


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
