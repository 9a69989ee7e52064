"""Tokens a second that collapse within one session of a run.

Nothing of it is kept over a resume, which may be on another machine.
"""

from __future__ import annotations

import statistics
from collections import deque

from kpsvd_tune.report.results import Event, StepMetrics
from kpsvd_tune.watch.telling import warning

# The first steps compile, warm caches up and read files.
WARM_UP = 3
# Steps whose median speed is a pace, at the start and now: single steps of long rows are slower.
WINDOW = 10
# Rows of other lengths, padding and a busy neighbour change the pace by two or three times.
TIMES = 5.0
# Slow steps have to have cost this much: where steps take milliseconds any pause is a collapse.
SECONDS = 20.0


class Slow:
    """Compares the pace of the last steps with that of the first ones of the session."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._first: list[float] = []
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def step(self, metrics: StepMetrics) -> Event | None:
        """Take in one step; the warning where the pace has collapsed."""
        self._num_steps += 1
        pace = metrics.tokens_per_second
        if self._num_steps <= WARM_UP or pace <= 0:
            return None
        if len(self._first) < WINDOW:
            self._first.append(pace)
            return None
        self._recent.append((pace, metrics.tokens / pace))
        usual, now = statistics.median(self._first), statistics.median(p for p, _ in self._recent)
        seconds = sum(each for _, each in self._recent)
        if len(self._recent) < WINDOW or now * TIMES > usual or seconds < SECONDS:
            return None
        return warning(
            "slow",
            f"The pace fell to {now:,.0f} tokens a second, from {usual:,.0f} at the start of this "
            "session.",
            "See what else uses the device or the CPUs, whether memory is swapped, and whether the "
            "device is throttled by heat; Ctrl-C saves, and the same command goes on.",
            metrics.step,
            tokens_per_second=now,
            at_start=usual,
            slow_seconds=seconds,
        )
