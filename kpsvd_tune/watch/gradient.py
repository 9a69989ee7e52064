"""A gradient that is clipped in most steps, and by much."""

from __future__ import annotations

import math
import statistics
from collections import deque

from kpsvd_tune.report.results import Event, StepMetrics
from kpsvd_tune.watch.telling import warning

# Steps looked at: clipping in the first steps of a run is what clipping is for.
WINDOW = 50
# Most of them have to be clipped ...
SHARE = 0.9
# ... and the usual norm has to be this many times the limit. Below that, clipping scales a step by
# a factor that AdamW's own scaling mostly undoes, and runs at the default limit are healthy.
TIMES = 10.0


class Clipping:
    """Finds that the limit, not the gradient, decides the size of nearly every step."""

    def __init__(self, max_grad_norm: float | None) -> None:
        self._limit = max_grad_norm
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def step(self, metrics: StepMetrics) -> Event | None:
        """Take in one step; the warning where most of the last ones were clipped by much."""
        if self._limit is None or metrics.skipped is not None:
            return None
        # A loss scaler's overflow has no norm.
        if math.isfinite(metrics.grad_norm):
            self._norms.append(metrics.grad_norm)
        if len(self._norms) < WINDOW:
            return None
        clipped = sum(norm > self._limit for norm in self._norms) / WINDOW
        median = statistics.median(self._norms)
        if clipped < SHARE or median < TIMES * self._limit:
            return None
        return warning(
            "clipping",
            f"The gradient was clipped in {100 * clipped:.0f} % of the last {WINDOW} steps: its "
            f"norm is usually {median:.3g}, and train.max_grad_norm is {self._limit:g}.",
            f"Raise train.max_grad_norm to about {2 * median:.1g} if the loss falls, or lower "
            "train.learning_rate if it does not.",
            metrics.step,
            share=clipped,
            median_norm=median,
            max_grad_norm=self._limit,
        )
