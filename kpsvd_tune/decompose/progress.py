"""How far a decomposition is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kpsvd_tune.decompose.tasks import Finished, Task
from kpsvd_tune.events import Events
from kpsvd_tune.units import time_left


@dataclass(frozen=True)
class Progress:
    """How far a decomposition is.

    Attributes:
        name: The matrix just finished.
        done: Matrices finished.
        total: Matrices in all.
        seconds_left: Estimate from the work done so far; None before anything was computed.
        energy: Mean share of ||W||_F^2 that the windows of the finished matrices hold.
    """

    name: str
    done: int
    total: int
    seconds_left: float | None
    energy: float


class ProgressMeter:
    """Turns finished matrices into :class:`Progress`.

    Args:
        tasks: All matrices that will be reported.
        show: Receives the progress; None for none.
    """

    def __init__(self, tasks: Sequence[Task], show: Callable[[Progress], None] | None) -> None:
        self._costs = {task.name: task.cost for task in tasks}
        self._show = show
        self._left = sum(self._costs.values())
        self._computed = 0.0
        self._energies: list[float] = []
        self._started: float | None = None

    def __call__(self, finished: Finished) -> None:
        """Count one more matrix and show where we are."""
        if self._started is None:
            # Loading a model that cannot be streamed says nothing about the matrices.
            self._started = time.perf_counter() - (finished.seconds if finished.is_new else 0.0)
        cost = self._costs[finished.name]
        self._left -= cost
        # What came from the cache took no time and says nothing about the rest.
        self._computed += cost if finished.is_new else 0.0
        self._energies.append(finished.energy)
        if self._show is None:
            return
        elapsed = time.perf_counter() - self._started
        rate = self._computed / elapsed if elapsed > 0 else 0.0
        self._show(
            Progress(
                name=finished.name,
                done=len(self._energies),
                total=len(self._costs),
                seconds_left=max(0.0, self._left) / rate if rate > 0 else None,
                energy=sum(self._energies) / len(self._energies),
            )
        )


def report_decomposition(events: Events) -> Callable[[Progress], None]:
    """A progress callback for the decomposition."""

    def advance(progress: Progress) -> None:
        detail = f"energy so far {100 * progress.energy:.1f} %"
        if left := time_left(progress.seconds_left):
            detail += f", {left}"
        events.advance("decomposing", progress.done, progress.total, detail)

    return advance
