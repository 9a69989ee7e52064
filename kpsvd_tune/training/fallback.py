"""What may happen by itself where a run goes wrong: `train.fallback`, in its order.

Its decisions rest on counters that a checkpoint holds and that are equal on all processes. So a
run that is killed between a fallback and its next checkpoint goes wrong again at the same step, and
falls back in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpsvd_tune.errors import NonFiniteError
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.report.results import Event
from kpsvd_tune.training.progress import Progress
from kpsvd_tune.units import counted
from kpsvd_tune.watch.loss import divergence

# What a checkpoint to go back to may have lost against the start, in its mean training loss.
_SLACK_FACTOR, _SLACK_NATS = 1.1, 0.1


class Diverged(NonFiniteError):
    """The run gets worse and worse, and `train.fallback` says to go back."""


def diverged(progress: Progress) -> Event | None:
    """The warning of a run that diverges; None where it does not."""
    return divergence(
        progress.step,
        progress.validations,
        progress.recent_losses,
        progress.validation_loss_before,
        progress.first_loss,
    )


def choose(recipe: TrainRecipe, progress: Progress, *, is_divergence: bool) -> str | None:
    """The first of `train.fallback` that applies and is not used up; None where none is left."""
    limits = recipe.nonfinite
    is_left = {
        "skip_batch": not is_divergence
        and progress.skip_streak < limits.max_streak
        and progress.num_skipped < limits.max_total,
        "lower_rate": progress.num_retries < limits.max_retries,
        "keep_best": progress.best_step is not None,
    }
    return next((way for way in recipe.fallback if is_left[way]), None)


def used_up(recipe: TrainRecipe, progress: Progress) -> str:
    """Why `train.fallback` has nothing left, as a sentence."""
    limits = recipe.nonfinite
    said = {
        "skip_batch": f"skip_batch left out {counted(progress.num_skipped, 'step')} "
        f"(train.nonfinite.max_streak is {limits.max_streak}, max_total {limits.max_total})",
        "lower_rate": f"lower_rate went back {counted(progress.num_retries, 'time')}, the last one "
        f"with {progress.rate_factor:g} times the learning rate (train.nonfinite.max_retries)",
        "keep_best": "keep_best had no validation to take the best of",
    }
    return f"train.fallback has nothing left: {'; '.join(said[way] for way in recipe.fallback)}"


def is_good(saved: Mapping[str, Any], now: Progress) -> bool:
    """Whether a checkpoint's counters are those of a run that was well.

    `now` are the counters at the fault: of a run whose validation loss rises, a checkpoint after
    the best validation is not good.
    """
    then = Progress(**saved)
    if then.step == 0:
        return True
    if diverged(then) is not None:
        return False
    if now.validations and now.best_step_loss is not None and diverged(now) is not None:
        before = now.validation_loss_before
        is_gain = before is None or now.best_step_loss < before
        return is_gain and now.best_step is not None and then.step <= now.best_step
    start = max((x for x in (then.first_loss, then.validation_loss_before) if x), default=None)
    return start is None or then.train_loss <= _SLACK_FACTOR * start + _SLACK_NATS
