"""Which trials a comparison consists of, and which of them come next."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kpsvd_tune.report.comparison import TrialRow


@dataclass(frozen=True, order=True)
class Trial:
    """One training run of a comparison.

    Attributes:
        method: The method's name.
        budget: Trainable parameters it may have.
        learning_rate: Its highest learning rate.
        seed: Seeds the order of the rows, dropout, and whatever the method draws.
    """

    method: str
    budget: int
    learning_rate: float
    seed: int

    @property
    def folder_name(self) -> str:
        """A file name of its own."""
        method = re.sub(r"[^A-Za-z0-9.+=-]+", "_", self.method)
        return f"{method}-{self.budget}-{self.learning_rate!r}-seed{self.seed}"


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
        rates, seeds, budgets = len(self.learning_rates), self.num_seeds, len(self.budgets)
        each = rates * seeds * budgets
        if self.plan == "staged":
            each = rates + min(2, rates) * (seeds - 1) + (budgets - 1) * seeds
        return {
            "methods": list(self.methods),
            "budgets": list(self.budgets),
            "learning_rates": list(self.learning_rates),
            "seeds": seeds,
            "plan": self.plan,
            "trials_per_method": each if self.plan != "done" else 0,
            "trials": each * len(self.methods) if self.plan != "done" else 0,
        }

    def holds(self, row: TrialRow) -> bool:
        """Whether a row is of this grid; the plan done takes every rate and seed there is."""
        is_own = row.method in self.methods and row.budget in self.budgets
        if self.plan == "done":
            return is_own
        return is_own and row.learning_rate in self.learning_rates and row.seed < self.num_seeds


def next_trials(grid: Grid, rows: Iterable[TrialRow]) -> list[Trial]:
    """Trials to run now; after them more may follow, until none is left.

    The full plan is every combination. The staged one has three stages: every rate with one seed
    at the middle budget; then all seeds at each method's two best rates there; then the other
    budgets with all seeds at each method's best rate. Every method gets the same number of trials
    in either. The plan done runs nothing: it judges what is there. Methods take turns, so that a
    comparison stopped early has a bit of each.

    Args:
        grid: What is compared.
        rows: Trials that are done.

    Returns:
        The trials of the first stage that is not done, without those that are; empty at the end.
    """
    done = {Trial(row.method, row.budget, row.learning_rate, row.seed): row for row in rows}
    if grid.plan == "done":
        return []
    for stage in _stages(grid, done) if grid.plan == "staged" else _full(grid):
        if left := [trial for trial in stage if trial not in done]:
            return left
    return []


def num_left(grid: Grid, rows: Sequence[TrialRow]) -> int:
    """How many trials are still to come: at most that many, where a later stage has some done.

    Args:
        grid: What is compared.
        rows: Trials that are done.
    """
    left = len(next_trials(grid, rows))
    if grid.plan == "staged" and left:
        sizes = _stage_sizes(grid)
        done = {Trial(row.method, row.budget, row.learning_rate, row.seed): row for row in rows}
        # The first stage that is not done ends the loop: the next one cannot be known yet.
        for number, stage in enumerate(_stages(grid, done), 1):
            if any(trial not in done for trial in stage):
                return left + sum(sizes[number:])
    return left


def _stage_sizes(grid: Grid) -> tuple[int, int, int]:
    """Trials of the stages of the staged plan."""
    rates, seeds, budgets = len(grid.learning_rates), grid.num_seeds, len(grid.budgets)
    each = (rates, min(2, rates) * (seeds - 1), (budgets - 1) * seeds)
    return tuple(size * len(grid.methods) for size in each)  # type: ignore[return-value]


def _full(grid: Grid) -> list[list[Trial]]:
    return [
        [
            Trial(method, budget, rate, seed)
            for seed in range(grid.num_seeds)
            for budget in grid.budgets
            for rate in grid.learning_rates
            for method in grid.methods
        ]
    ]


def _stages(grid: Grid, done: dict[Trial, TrialRow]) -> Iterable[list[Trial]]:
    # The next stage is asked for when this one is done, so its rows are there.
    middle = sorted(grid.budgets)[len(grid.budgets) // 2]
    yield [
        Trial(method, middle, rate, 0) for rate in grid.learning_rates for method in grid.methods
    ]
    best = {
        method: _best_rates(
            [done[Trial(method, middle, rate, 0)] for rate in grid.learning_rates], 2
        )
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
            [
                done[Trial(method, middle, rate, seed)]
                for rate in best[method]
                for seed in range(grid.num_seeds)
            ],
            1,
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


def _best_rates(rows: Sequence[TrialRow], count: int) -> list[float]:
    """The rates with the lowest mean validation loss; a failed trial counts as infinite."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        loss = math.inf if row.validation_loss is None else row.validation_loss
        losses.setdefault(row.learning_rate, []).append(loss)
    return sorted(losses, key=lambda rate: (sum(losses[rate]) / len(losses[rate]), rate))[:count]
