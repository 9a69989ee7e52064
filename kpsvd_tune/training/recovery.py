"""What follows a step that failed: a value that is not finite, or memory that ran out.

Nothing infinite or NaN may reach a weight, so every step is checked before its update; the step is
then skipped, tried again from the last checkpoint, or ends the run.

With `train.on_oom: halve` a micro batch of B rows is computed in pieces of half as many, one after
the other, for the rest of the run. Sampler, loss and schedule know nothing of it: a step's rows,
the loss over them and the update stay what they were, up to the rounding of sums in another order.
Random numbers of dropout are drawn piece by piece, and so are others.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from kpsvd_tune.errors import NonFiniteError, RecipeError, ResourceError
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.storage.memory import is_out_of_memory, out_of_memory
from kpsvd_tune.training.progress import Progress

_log = logging.getLogger(__name__)
_MOST_ROWS = 16
_CURE = (
    "The step was not taken and the last checkpoint is untouched. Try a lower "
    "train.learning_rate, a smaller train.max_grad_norm, or train.precision: no"
)


def find_fault(
    step: int,
    losses: Sequence[float],
    grad_norm: float | None,
    rows_of: Callable[[int], Sequence[int]],
) -> str | None:
    """What is not finite in a step (from 1), and in which rows; None where all is finite.

    `losses` are those of each process; `grad_norm` is None where the loss scaler judges it.
    """
    for process, loss in enumerate(losses):
        if not math.isfinite(loss):
            return (
                f"step {step}: the loss is {loss} on process {process}, in one of the rows "
                f"{_listed(rows_of(process))}"
            )
    if grad_norm is not None and not math.isfinite(grad_norm):
        rows = [row for process in range(len(losses)) for row in rows_of(process)]
        where = "process 0" if len(losses) == 1 else f"processes 0 to {len(losses) - 1}"
        return (
            f"step {step}: the gradient norm is {grad_norm} while every loss is finite; "
            f"the step's rows on {where}: {_listed(rows)}"
        )
    return None


def skip_or_refuse(fault: str, progress: Progress, recipe: TrainRecipe, is_main: bool) -> None:
    """Count a step that was left out for `fault`, or end the run, as `train.on_nonfinite` says."""
    if recipe.on_nonfinite != "skip":
        raise NonFiniteError(f"{fault}. {_CURE}")
    limits = recipe.nonfinite
    progress.num_skipped += 1
    progress.skip_streak += 1
    for count, limit, key in (
        (progress.skip_streak, limits.max_streak, "max_streak"),
        (progress.num_skipped, limits.max_total, "max_total"),
    ):
        if count > limit:
            kind = "in a row" if key == "max_streak" else "in all"
            raise NonFiniteError(
                f"{fault}; that is step {count} {kind} to be skipped, and "
                f"train.nonfinite.{key} is {limit}. {_CURE}"
            )
    if is_main:
        _log.warning(
            "%s; the step was skipped (%d in a row, %d in all)",
            fault,
            progress.skip_streak,
            progress.num_skipped,
        )


def retry_or_refuse(
    error: NonFiniteError, progress: Progress, recipe: TrainRecipe
) -> tuple[int, float]:
    """The number of the next try, from 1, and its factor of the learning rate; or end the run."""
    limits = recipe.nonfinite
    if recipe.on_nonfinite != "retry":
        raise error
    if progress.num_retries >= limits.max_retries:
        raise NonFiniteError(
            f"{error}. It was tried again {progress.num_retries} times, the last one with "
            f"{progress.rate_factor:g} times the learning rate (train.nonfinite.max_retries)"
        )
    return progress.num_retries + 1, progress.rate_factor * limits.retry_factor


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_MOST_ROWS]))
    more = len(rows) - _MOST_ROWS
    return f"{shown} and {more} more" if more > 0 else shown


class MicroStepOutOfMemory(ResourceError):
    """Memory ran out in a forward or backward pass; no weight has moved and no gradient is left."""


@contextmanager
def memory_refused(recipe: TrainRecipe, doing: str) -> Iterator[None]:
    """With `train.on_oom: halve`, raise MicroStepOutOfMemory where memory runs out inside."""
    try:
        yield
    except Exception as error:
        if recipe.on_oom != "halve" or not is_out_of_memory(error):
            raise
        refusal = str(out_of_memory(error, doing, ()))
    else:
        return
    # Outside the except block, whose traceback keeps the tensors of the failed pass.
    raise MicroStepOutOfMemory(refusal)


def check_halving(recipe: TrainRecipe, num_processes: int, is_zero: bool) -> None:
    """Refuse `train.on_oom: halve` with several processes, or DeepSpeed's."""
    if recipe.on_oom != "halve" or (num_processes == 1 and not is_zero):
        return
    got = "DeepSpeed takes the steps" if is_zero else f"there are {num_processes}"
    raise RecipeError(
        f"train.on_oom: halve works with one plain process, and {got}: when one of several finds "
        "no memory the others already wait for its gradients. Leave it out, and lower "
        "train.batch_size with train.gradient_accumulation raised by as much"
    )


def rows_at_once(recipe: TrainRecipe, progress: Progress) -> int:
    """Rows of a forward pass: `train.batch_size`, or fewer after memory ran out."""
    return min(progress.micro_batch_size or recipe.batch_size, recipe.batch_size)


def halve(error: ResourceError, recipe: TrainRecipe, progress: Progress) -> None:
    """Count another halving and log it; refuse where the passes take one row already."""
    now = rows_at_once(recipe, progress)
    if now == 1:
        raise ResourceError(
            f"{error}. One row was computed at a time, after {progress.num_halvings} halvings of "
            f"train.batch_size {recipe.batch_size} (train.on_oom). What helps:\n"
            "  - train.gradient_checkpointing: true, which keeps fewer activations\n"
            "  - a lower dataset.max_length: shorter rows\n"
            "  - model.dtype: bfloat16, or a smaller model.path"
        )
    progress.micro_batch_size = (now + 1) // 2
    progress.num_halvings += 1
    _log.warning(
        "%s. From here on forward passes take %d of %d rows at a time (train.on_oom: halve); the "
        "rows of a step and its update stay the same, up to rounding",
        error,
        progress.micro_batch_size,
        now,
    )


def give_memory_back() -> None:
    """Free what failed passes left behind, so that the next one finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
