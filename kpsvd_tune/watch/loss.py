"""A loss that jumps, and a loss that does not come back."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from kpsvd_tune.report.results import Event, StepMetrics
from kpsvd_tune.watch.telling import warning

# Losses that a new one is held against: enough for a median that a few odd batches do not move.
SPIKE_WINDOW = 32
# Fewer than this say little about how much the loss of a batch varies.
SPIKE_LEAST = 10
# A jump has to be far outside of what the batches vary by (the median absolute deviation, scaled to
# a standard deviation), above everything seen lately, and large in itself: batches of one row vary
# by several deviations, and a loss near 0 by large factors of next to nothing.
SPIKE_DEVIATIONS = 10.0
SPIKE_OVER_LARGEST = 1.5
SPIKE_NATS = 0.5
_TO_DEVIATION = 1.4826

# Validations in a row that rise before it is called divergence: two can be chance.
RISING_CHECKS = 3
# What they have to rise by together, as a share of the first: less is noise of a flat curve.
RISING_SHARE = 0.02
# A model this far above its start, in a validation or in the median of the last ten steps, has lost
# what it knew. Single batches differ by less than that from the first one.
WORSE_FACTOR = 1.5
WORSE_NATS = 0.5
RECENT_STEPS = 10

_RATE_CURE = (
    "Lower train.learning_rate to a third or a tenth, or lengthen the warm-up "
    "(train.warmup_ratio); train.fallback: [lower_rate] does the first by itself."
)


class LossSpike:
    """Finds a step whose loss jumps above those of the steps before it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def step(self, metrics: StepMetrics) -> Event | None:
        """Take in one step; the warning where its loss is a spike."""
        found = None
        if metrics.skipped is None:
            found = self._compare(metrics)
            self._losses.append(metrics.loss)
        return found

    def _compare(self, metrics: StepMetrics) -> Event | None:
        if len(self._losses) < SPIKE_LEAST:
            return None
        median = statistics.median(self._losses)
        deviation = _TO_DEVIATION * statistics.median(abs(each - median) for each in self._losses)
        limit = max(
            median + SPIKE_DEVIATIONS * deviation,
            SPIKE_OVER_LARGEST * max(self._losses),
            median + SPIKE_NATS,
        )
        if metrics.loss <= limit:
            return None
        return warning(
            "loss_spike",
            f"The training loss jumped to {metrics.loss:.4g}, where the median of the "
            f"{len(self._losses)} steps before is {median:.4g}.",
            "Look at the rows of this step; if it happens again lower train.learning_rate or "
            "train.max_grad_norm.",
            metrics.step,
            loss=metrics.loss,
            median=median,
            limit=limit,
            learning_rate=metrics.learning_rate,
            grad_norm=metrics.grad_norm,
        )


def divergence(
    step: int,
    validations: Sequence[Sequence[float]],
    losses: Sequence[float],
    before: float | None,
    first: float | None,
) -> Event | None:
    """The warning of a run that gets worse and worse; None where it does not.

    Args:
        step: Optimiser steps done.
        validations: (step, loss) of the last validations, oldest first; the first may be of step 0.
        losses: Training losses of the last steps.
        before: Validation loss before the first step.
        first: Training loss of the first step, which no update had touched.
    """
    rising = validations[-RISING_CHECKS - 1 :]
    if len(rising) > RISING_CHECKS:
        values = [loss for _, loss in rising]
        is_rising = all(old < new for old, new in zip(values, values[1:], strict=False))
        if is_rising and values[-1] - values[0] > RISING_SHARE * values[0]:
            train = sum(losses) / max(1, len(losses))
            is_overfit = bool(losses) and first is not None and train < first
            return warning(
                "divergence",
                f"The validation loss rose in {RISING_CHECKS} checks in a row, from "
                f"{values[0]:.4g} at step {int(rising[0][0])} to {values[-1]:.4g}.",
                "The training loss fell meanwhile, so the rows are learnt by heart: set "
                "train.keep: best or train.early_stopping, train less (train.epochs), or take more "
                "rows."
                if is_overfit
                else _RATE_CURE,
                step,
                validation_loss=values[-1],
                lowest=values[0],
                lowest_step=int(rising[0][0]),
                train_loss=train,
            )
    if validations and before is not None and _is_worse(validations[-1][1], before):
        return warning(
            "divergence",
            f"The validation loss is {validations[-1][1]:.4g}, far above the {before:.4g} before "
            "the first step.",
            _RATE_CURE,
            step,
            validation_loss=validations[-1][1],
            before=before,
        )
    start = max((each for each in (before, first) if each is not None), default=None)
    if len(losses) < RECENT_STEPS or start is None:
        return None
    # The median: one spike is no divergence.
    median = statistics.median(losses)
    if _is_worse(median, start):
        return warning(
            "divergence",
            f"The training loss of the last {len(losses)} steps is {median:.4g} (median), far "
            f"above the {start:.4g} that the run began with.",
            _RATE_CURE,
            step,
            train_loss=median,
            start=start,
        )
    return None


def _is_worse(loss: float, start: float) -> bool:
    return loss > WORSE_FACTOR * start + WORSE_NATS
