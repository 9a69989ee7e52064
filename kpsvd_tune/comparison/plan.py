"""Which trials a comparison consists of, and which of them come next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpsvd_tune.report.comparison import Trial, TrialRow


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        methods: Names.
        budgets: Trainable parameters.
        learning_rates: Tried for every method.
        num_seeds: Seeds 0 to num_seeds - 1.
        plan: full, staged or done; see :func:`next_trials`.
    """

    methods: Sequence[str]
    budgets: Sequence[int]
    learning_rates: Sequence[float]
    num_seeds: int
    plan: str

    def summary(self) -> dict[str, Any]:
        """What would be run, for a person or as JSON."""
        each = sum(self.stage_sizes())
        return {
            "methods": list(self.methods),
            "budgets": list(self.budgets),
            "learning_rates": list(self.learning_rates),
            "seeds": self.num_seeds,
            "plan": self.plan,
            "trials_per_method": each,
            "trials": each * len(self.methods),
        }

    def stage_sizes(self) -> tuple[int, ...]:
        """Trials of each stage of the plan, a method."""
        rates, seeds, budgets = len(self.learning_rates), self.num_seeds, len(self.budgets)
        if self.plan == "done":
            return (0,)
        if self.plan == "full":
            return (rates * seeds * budgets,)
        return rates, min(2, rates) * (seeds - 1), (budgets - 1) * seeds

    def holds(self, row: TrialRow) -> bool:
        """Whether a row is of this grid; the plan done takes every rate and seed there is."""
        is_own = row.method in self.methods and row.budget in self.budgets
        if self.plan == "done":
            return is_own
        return is_own and row.learning_rate in self.learning_rates and row.seed < self.num_seeds


def next_trials(grid: Grid, rows: Iterable[TrialRow]) -> list[Trial]:
    """Trials of the first stage that is not done, without those that are; empty at the end.

    The full plan is every combination. The staged one has three stages: every rate with one seed
    at the middle budget; then all seeds at each method's two best rates there; then the other
    budgets with all seeds at each method's best rate. Every method gets the same number of trials
    in either. The plan done runs nothing: it judges what is there. Methods take turns, so that a
    comparison that is stopped early has some trials of each.
    """
    return _stage(grid, rows)[1]


def num_left(grid: Grid, rows: Iterable[TrialRow]) -> int:
    """How many trials are still to come: at most that many, where a later stage has some done."""
    number, left = _stage(grid, rows)
    # Which trials the later stages hold is not known yet, but how many.
    return len(left) + sum(grid.stage_sizes()[number + 1 :]) * len(grid.methods)


def _stage(grid: Grid, rows: Iterable[TrialRow]) -> tuple[int, list[Trial]]:
    """The first stage that is not done, from 0, and what is left of it."""
    done = {row.trial: row for row in rows}
    stages: Callable[..., Iterable[list[Trial]]]
    stages = {"full": _full, "staged": _stages, "done": lambda *_: ()}[grid.plan]
    for number, stage in enumerate(stages(grid, done)):
        if left := [trial for trial in stage if trial not in done]:
            return number, left
    return len(grid.stage_sizes()), []


def _full(grid: Grid, done: Mapping[Trial, TrialRow]) -> Iterable[list[Trial]]:
    yield [
        Trial(method, budget, rate, seed)
        for seed in range(grid.num_seeds)
        for budget in grid.budgets
        for rate in grid.learning_rates
        for method in grid.methods
    ]


def _stages(grid: Grid, done: Mapping[Trial, TrialRow]) -> Iterable[list[Trial]]:
    # The next stage is asked for when this one is done, so its rows are there.
    middle = sorted(grid.budgets)[len(grid.budgets) // 2]
    yield [
        Trial(method, middle, rate, 0) for rate in grid.learning_rates for method in grid.methods
    ]
    best = {
        method: _best_rates(done[Trial(method, middle, r, 0)] for r in grid.learning_rates)[:2]
        for method in grid.methods
    }
    yield [
        Trial(method, middle, best[method][place], seed)
        for seed in range(1, grid.num_seeds)
        for place in range(len(best[grid.methods[0]]))
        for method in grid.methods
    ]
    finalists = {
        method: _best_rates(
            done[Trial(method, middle, rate, seed)]
            for rate in best[method]
            for seed in range(grid.num_seeds)
        )[0]
        for method in grid.methods
    }
    yield [
        Trial(method, budget, finalists[method], seed)
        for seed in range(grid.num_seeds)
        for budget in grid.budgets
        for method in grid.methods
        if budget != middle
    ]


def _best_rates(rows: Iterable[TrialRow]) -> list[float]:
    """The rates, lowest mean validation loss first; a failed trial counts as infinite."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        loss = math.inf if row.validation_loss is None else row.validation_loss
        losses.setdefault(row.learning_rate, []).append(loss)
    return sorted(losses, key=lambda rate: (sum(losses[rate]) / len(losses[rate]), rate))
