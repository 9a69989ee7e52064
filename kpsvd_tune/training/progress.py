"""Where a training stands, and what follows a step that failed.

A step fails by a value that is not finite, or by memory that ran out.

Nothing infinite or NaN may reach a weight, so every step is checked before its update; the step is
then skipped, tried again from the last checkpoint, or ends the run.

With `train.on_oom: halve` a micro batch of B rows is computed in pieces of half as many, one after
the other, for the rest of the run. Sampler, loss and schedule know nothing of it: a step's rows,
the loss over them and the update stay what they were, up to the rounding of sums in another order.
Random numbers of dropout are drawn piece by piece, and so are others.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kpsvd_tune.errors import NonFiniteError, RecipeError, ResourceError, some_of
from kpsvd_tune.recipe import EarlyStopping, TrainRecipe
from kpsvd_tune.report.results import Event, StepMetrics
from kpsvd_tune.storage.memory import is_out_of_memory, out_of_memory
from kpsvd_tune.units import counted
from kpsvd_tune.watch.loss import RISING_CHECKS
from kpsvd_tune.watch.telling import fallback

# Validations that are remembered: those that can rise in a row, and the one before.
_RECENT_CHECKS = RISING_CHECKS + 1
_MOST_ROWS = 16
CURE = (
    "The step was not taken and the last checkpoint is untouched. Try a lower "
    "train.learning_rate, a smaller train.max_grad_norm, or train.precision: no"
)
# Steps whose mean loss is reported as the training loss: enough to smooth one odd batch.
_RECENT_STEPS = 10


@dataclass
class Progress:
    """Counters after `step` optimiser steps; JSON values only."""

    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # spent in this run, over all its sessions
    peak_memory_bytes: int = 0  # the most that the main process held, over all its sessions
    # (summed loss, supervised tokens) of the last steps.
    recent: list[list[float]] = field(default_factory=list)
    validation_loss: float | None = None  # the newest one
    validation_loss_before: float | None = None  # the one before the first step
    best_validation_loss: float | None = None  # the lowest that early stopping counted as a gain
    num_stale: int = 0  # validations since then
    is_stopped_early: bool = False  # early stopping ended the run
    best_step: int | None = None  # of the lowest validation loss of all; its checkpoint is kept
    best_step_loss: float | None = None  # that loss
    num_skipped: int = 0  # steps skipped because something was not finite
    skip_streak: int = 0  # those of them since the last step that was taken
    num_retries: int = 0  # returns to a checkpoint because something was not finite
    rate_factor: float = 1.0  # what they left of the learning rate
    # Rows a pass, where memory asked for fewer than `batch_size`.
    micro_batch_size: int | None = None
    num_halvings: int = 0  # how often it did
    first_loss: float | None = None  # training loss of the first step, which no update touched
    # (step, loss) of the last validations, the one before the first step included.
    validations: list[list[float]] = field(default_factory=list)
    keeps_best: bool = False  # `train.fallback` ended the run with the adapter of its best step
    pending: dict[str, Any] | None = None  # of a step that a signal left to be validated and logged

    def count_step(self, loss: float, num_supervised: float, metrics: StepMetrics) -> None:
        """Count a step that was just taken, or skipped."""
        self.step = metrics.step
        self.peak_memory_bytes = metrics.memory_bytes or self.peak_memory_bytes
        # JSON has no NaN and no infinity.
        self.pending = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(metrics).items()
        }
        if metrics.skipped is None:
            self.skip_streak = 0
            if self.step == 1:
                self.first_loss = metrics.loss
            self.recent = [*self.recent, [loss, num_supervised]][-_RECENT_STEPS:]

    def pending_metrics(self) -> StepMetrics | None:
        """The metrics of a step whose validation and line are still to come."""
        if self.pending is None:
            return None
        numbers = {name: float(self.pending[name]) for name in ("loss", "grad_norm")}
        return StepMetrics(**{**self.pending, **numbers})

    def count_validation(self, loss: float, rule: EarlyStopping | None) -> None:
        """Take in a validation loss, and decide about stopping early."""
        self.validation_loss = loss
        if not self.validations and self.validation_loss_before is not None:
            self.validations = [[0, self.validation_loss_before]]
        self.validations = [*self.validations, [self.step, loss]][-_RECENT_CHECKS:]
        if self.best_step_loss is None or loss < self.best_step_loss:
            self.best_step, self.best_step_loss = self.step, loss
        if rule is None:
            return
        best = self.best_validation_loss
        if best is None or loss < best - rule.min_delta:
            self.best_validation_loss, self.num_stale = loss, 0
        else:
            self.num_stale += 1
            self.is_stopped_early = self.num_stale >= rule.patience

    @property
    def recent_losses(self) -> list[float]:
        """Losses of the last steps that were taken."""
        return [loss / max(1.0, num_supervised) for loss, num_supervised in self.recent]

    @property
    def train_loss(self) -> float:
        """Mean loss over the supervised tokens of the last steps."""
        num_supervised = sum(each for _, each in self.recent)
        return sum(each for each, _ in self.recent) / max(1.0, num_supervised)


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
                f"{some_of([*map(str, rows_of(process))], _MOST_ROWS)}"
            )
    if grad_norm is not None and not math.isfinite(grad_norm):
        rows = [str(row) for process in range(len(losses)) for row in rows_of(process)]
        where = "process 0" if len(losses) == 1 else f"processes 0 to {len(losses) - 1}"
        return (
            f"step {step}: the gradient norm is {grad_norm} while every loss is finite; "
            f"the step's rows on {where}: {some_of(rows, _MOST_ROWS)}"
        )
    return None


def count_skip(progress: Progress) -> None:
    """Count a step that is left out."""
    progress.num_skipped += 1
    progress.skip_streak += 1


def check_skips(fault: str, progress: Progress, recipe: TrainRecipe) -> None:
    """End the run where `train.on_nonfinite: skip` has left out more steps than it may."""
    limits = recipe.nonfinite
    for count, limit, key in (
        (progress.skip_streak, limits.max_streak, "max_streak"),
        (progress.num_skipped, limits.max_total, "max_total"),
    ):
        if count > limit:
            kind = "in a row" if key == "max_streak" else "in all"
            raise NonFiniteError(
                f"{fault}; that is step {count} {kind} to be skipped, and "
                f"train.nonfinite.{key} is {limit}. {CURE}"
            )


def retry_or_refuse(
    error: NonFiniteError, progress: Progress, recipe: TrainRecipe
) -> tuple[int, float]:
    """The number of the next try, from 1, and its factor of the learning rate; or end the run."""
    limits = recipe.nonfinite
    if progress.num_retries >= limits.max_retries:
        raise NonFiniteError(
            f"{error}. It was tried again {counted(progress.num_retries, 'time')}, the last one "
            "with "
            f"{progress.rate_factor:g} times the learning rate (train.nonfinite.max_retries)"
        )
    return progress.num_retries + 1, progress.rate_factor * limits.retry_factor


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


def halve(error: ResourceError, recipe: TrainRecipe, progress: Progress) -> Event:
    """Count another halving, to be told; refuse where the passes take one row already."""
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
    return fallback(
        "halve",
        f"{error}. From here on forward passes take {progress.micro_batch_size} of {now} rows at a "
        "time (train.on_oom: halve); the rows of a step and its update stay the same, up to "
        "rounding",
        "Next time set train.batch_size to that, and raise train.gradient_accumulation by as much.",
        progress.step,
        rows=progress.micro_batch_size,
        num_halvings=progress.num_halvings,
    )


def give_memory_back() -> None:
    """Free what failed passes left behind, so that the next one finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
