"""A budget of money for a comparison: which trials it buys, and when no further one may start.

A trial costs what the longest finished one of its kind took, with a margin: of its method and
budget, else of its method, else of any. Before the first one is measured the upper end of the
estimate of `plan` counts. Trials are bought in the plan's order, and the first that does not fit
ends the comparison, so that methods have equal numbers of trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kpsvd_tune.comparison.plan import Grid, Planned, planned
from kpsvd_tune.errors import InputError
from kpsvd_tune.report.comparison import Trial, TrialRow
from kpsvd_tune.units import counted, duration, money

# Of a time that was measured on the same method at the same budget, and on others.
_MARGIN, _OTHER_MARGIN = 1.1, 1.3


@dataclass(frozen=True)
class Price:
    """What device time costs, and how much may be spent."""

    amount: float  # money for the whole comparison
    per_hour: float  # of one device
    currency: str
    share: float = 1.0  # of a device that a running trial takes: below 1 where several share one

    def cost(self, device_seconds: float) -> float:
        """The price of device time."""
        return device_seconds / 3600 * self.per_hour

    def words(self, amount: float) -> str:
        """An amount with its currency."""
        return f"{money(amount)} {self.currency}"


class Forecast:
    """How long a trial will take.

    Args:
        rows: Finished trials; one that failed says nothing of how long a whole one takes.
        estimate: Gives least and most seconds of a trial; asked where none is measured.
        scoring: Seconds to score the model of a trial; 0 where nothing is scored.
    """

    def __init__(
        self,
        rows: Sequence[TrialRow],
        estimate: Callable[[], tuple[float, float]],
        scoring: float = 0.0,
    ) -> None:
        self._all, self._estimate = rows, estimate
        self.scoring = scoring

    @property
    def _rows(self) -> list[TrialRow]:
        return [row for row in self._all if row.failed is None]

    def seconds(self, method: str, budget: int) -> float:
        """Seconds that a trial takes at most, by what is known now."""
        own = [row.seconds for row in self._rows if (row.method, row.budget) == (method, budget)]
        if own:
            return _MARGIN * max(own)
        same = [row.seconds for row in self._rows if row.method == method]
        known = same or [row.seconds for row in self._rows]
        return _OTHER_MARGIN * max(known) if known else self._estimate()[1]

    @property
    def basis(self) -> str:
        """What the seconds rest on, in words."""
        if self._rows:
            number = len(self._rows)
            return f"by the {number} that are done" if number > 1 else "by the one that is done"
        low, high = self._estimate()
        return f"by the estimate of `plan`, {duration(low)} to {duration(high)} each"


class Purse:
    """Holds the money: says which trials it buys, and lets them start or not.

    Args:
        price: What device time costs, and how much may be spent.
        forecast: Tells how long a trial takes.
        spent: Gives device seconds so far.
        unscored: Counts finished trials that are still to be scored, whose money is kept back.
    """

    def __init__(
        self,
        price: Price,
        forecast: Forecast,
        spent: Callable[[], float],
        unscored: Callable[[], int] = lambda: 0,
    ) -> None:
        self.price, self.forecast = price, forecast
        self._spent, self._unscored = spent, unscored
        self._running: dict[Trial, float] = {}  # when each was started
        self.refused: Trial | None = None  # the trial that the money did not buy
        self._num_scoring = 0  # scorings that run
        self._rounding = 1e-9 * price.amount

    @property
    def left(self) -> float:
        """Money that is not spent yet."""
        return self.price.amount - self.price.cost(self._spent())

    def may_start(self, trial: Trial) -> bool:
        """Whether the money holds a trial besides those that run; it then counts as started."""
        now = time.monotonic()
        running = [self._cost(each, since=now - began) for each, began in self._running.items()]
        if self._cost(trial) + sum(running) > self._free + self._rounding:
            self.refused = trial
            return False
        self.refused = None
        self._running[trial] = now
        return True

    def run_elsewhere(self, trials: Mapping[Trial, float]) -> None:
        """Say which trials others run and since when, by time.monotonic(); in place of earlier."""
        self._running = dict(trials)

    def may_score(self) -> bool:
        """Whether the money holds a scoring besides those that run; it then counts as started."""
        cost = self.price.cost(self.forecast.scoring)
        if cost * (self._num_scoring + 1) > self.left + self._rounding:
            return False
        self._num_scoring += 1
        return True

    def scored(self) -> None:
        """Say that a scoring runs no more."""
        self._num_scoring -= 1

    def ended(self, trial: Trial) -> None:
        """Say that a trial runs no more."""
        self._running.pop(trial, None)

    def split(self, coming: Sequence[Planned]) -> tuple[list[Planned], list[Planned]]:
        """Those of the trials to come, in their order, that the money buys, and the rest."""
        left = self._free
        for place, each in enumerate(coming):
            left -= self._cost(each)
            if left < -self._rounding:
                return list(coming[:place]), list(coming[place:])
        return list(coming), []

    def plan_lines(self, grid: Grid, rows: Sequence[TrialRow]) -> list[str]:
        """What the money buys and what is left out, one line each."""
        coming = planned(grid, rows)
        bought, rest = self.split(coming)
        price, spent = self.price, self.price.cost(self._spent())
        lines = [
            f"money: {price.words(price.amount)} at {price.words(price.per_hour)} an hour; "
            f"{price.words(spent)} spent so far; a trial costs "
            f"{self._costs(coming)}, {self.forecast.basis}"
        ]
        if not coming:
            return [*lines, "every trial of the plan is done"]
        lines.append(
            f"the money buys {len(bought)} of the {counted(len(coming), 'trial')} to come"
            + (f": {_counted(bought)}" if bought else "")
        )
        if rest:
            lines.append(
                f"left out: {_counted(rest)}; all of them would take about "
                f"{price.words(self.needed(coming))} in all"
            )
        return lines

    def needed(self, coming: Sequence[Planned]) -> float:
        """Money that the whole comparison would take, with what is spent."""
        kept = self.left - self._free
        return self.price.cost(self._spent()) + kept + sum(map(self._cost, coming))

    def check(self, grid: Grid, rows: Sequence[TrialRow]) -> None:
        """Refuse money that buys nothing where nothing is there to judge either."""
        coming = planned(grid, rows)
        if rows or not coming or self.split(coming)[0]:
            return
        price, first = self.price, coming[0]
        raise InputError(
            f"--money: {price.words(price.amount)} buys no trial: "
            f"{price.words(price.cost(self._spent()))} is spent (preparing counts) and one "
            f"costs up to {price.words(self._cost(first))} ({self.forecast.basis}); raise "
            "--money, or lower train.max_steps"
        )

    @property
    def _free(self) -> float:
        """Money that is not kept back for the scoring of finished trials."""
        return self.left - self.price.cost(self.forecast.scoring * self._unscored())

    def _cost(self, trial: Trial | Planned, since: float = 0.0) -> float:
        """Money that a trial still takes, so many seconds after its start; its scoring included.

        A scoring is counted as if it had a device to itself, as the last of several has.
        """
        seconds = max(0.0, self.forecast.seconds(trial.method, trial.budget) - since)
        return self.price.cost(seconds * self.price.share + self.forecast.scoring)

    def _costs(self, coming: Sequence[Planned]) -> str:
        """The cheapest and the dearest trial to come."""
        found = sorted(map(self._cost, coming)) or [0.0]
        low, high = (self.price.words(each) for each in (found[0], found[-1]))
        return f"up to {high}" if low == high else f"up to {low} to {high}"


def _counted(trials: Sequence[Planned]) -> str:
    """How many trials of each stage and method."""
    counts: dict[str, dict[str, int]] = {}
    for each in trials:
        methods = counts.setdefault(each.stage, {})
        methods[each.method] = methods.get(each.method, 0) + 1
    return "; ".join(f"{stage}{_listed(methods)}" for stage, methods in counts.items())


def _listed(methods: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in methods.items())
