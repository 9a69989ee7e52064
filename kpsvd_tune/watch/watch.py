"""All that looks at every step, together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kpsvd_tune.report.results import Event, StepMetrics
from kpsvd_tune.watch import gradient, loss
from kpsvd_tune.watch.gradient import Clipping
from kpsvd_tune.watch.loss import LossSpike
from kpsvd_tune.watch.speed import Slow

# Lines of metrics.jsonl that bring the detectors to where they were.
MEMORY = max(loss.SPIKE_WINDOW, gradient.WINDOW)


class Watch:
    """Looks at each step of a session, at the cost of a few comparisons.

    Args:
        max_grad_norm: Where gradients are clipped; None: nowhere.
        before: The steps before, which are taken in and not told; the last `MEMORY` are enough.
    """

    def __init__(self, max_grad_norm: float | None, before: Iterable[StepMetrics] = ()) -> None:
        self._detectors = (LossSpike(), Clipping(max_grad_norm))
        for metrics in before:
            for detector in self._detectors:
                detector.step(metrics)
        self._slow = Slow()

    def step(self, metrics: StepMetrics) -> Iterator[Event]:
        """Take in one step; gives what looks wrong, however often it was told before."""
        for detector in (*self._detectors, self._slow):
            if (found := detector.step(metrics)) is not None:
                yield found
