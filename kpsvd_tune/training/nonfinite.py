"""The check before every optimiser step: nothing infinite or NaN may reach a weight."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from kpsvd_tune.errors import NonFiniteError
from kpsvd_tune.recipe import TrainRecipe
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
    """Say what is not finite in a step.

    Args:
        step: The step, counted from 1.
        losses: Summed loss of each process.
        grad_norm: Norm of the whole gradient; None where the loss scaler judges it.
        rows_of: Row numbers of the step on one process, for the message.

    Returns:
        A sentence without its full stop that names step, process and rows; None if all is finite.
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
    """Count a step that was left out, or end the run, as `train.on_nonfinite` says.

    Args:
        fault: From `find_fault`.
        progress: Its counters of skipped steps are raised.
        recipe: The `train` section.
        is_main: Whether this process is the one that writes the log.

    Raises:
        NonFiniteError: Steps are not to be skipped, or too many were.
    """
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
    """Allow another try from the last checkpoint, or end the run.

    Args:
        error: What ended the last try.
        progress: Where that try stood.
        recipe: The `train` section.

    Returns:
        The number of the try, from 1, and what the recipe's learning rate is multiplied by in it.

    Raises:
        NonFiniteError: `train.nonfinite.max_retries` are used up, or none are wanted.
    """
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
