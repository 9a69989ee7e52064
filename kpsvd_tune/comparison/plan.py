"""Which trials a comparison consists of, and which of them come next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from kpsvd_tune.report.comparison import Trial, TrialRow

Done = Mapping[Trial, TrialRow]


@dataclass(frozen=True)
class Entry:
    """One method in a comparison, with the budgets and the learning rates that it is tried at."""

    method: str
    budgets: Sequence[int]  # trainable parameters
    learning_rates: Sequence[float]


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        entries: The methods.
        num_seeds: Seeds 0 to num_seeds - 1.
        plan: full, staged or done; see :func:`next_trials`.
    """

    entries: Sequence[Entry]
    num_seeds: int
    plan: str

    def with_budgets(self, budgets: Mapping[str, Sequence[int]]) -> Grid:
        """The same with other budgets, by method."""
        return replace(
            self,
            entries=[replace(each, budgets=tuple(budgets[each.method])) for each in self.entries],
        )

    def summary(self) -> dict[str, Any]:
        """What would be run, for a person or as JSON."""
        trials = {each.method: sum(self.stage_sizes(each)) for each in self.entries}
        return {
            "methods": list(trials),
            "budgets": sorted({budget for each in self.entries for budget in each.budgets}),
            "learning_rates": {each.method: list(each.learning_rates) for each in self.entries},
            "seeds": self.num_seeds,
            "plan": self.plan,
            "trials_per_method": trials,
            "trials": sum(trials.values()),
        }

    def stage_sizes(self, entry: Entry) -> tuple[int, ...]:
        """Trials of each stage of the plan, of one method."""
        rates, seeds, budgets = len(entry.learning_rates), self.num_seeds, len(entry.budgets)
        if self.plan == "done":
            return ()
        if self.plan == "full":
            return (rates * seeds * budgets,)
        return rates, min(2, rates) * (seeds - 1), (budgets - 1) * seeds

    def holds(self, row: TrialRow) -> bool:
        """Whether a row is of this grid; the plan done takes every rate and seed there is."""
        own = next((each for each in self.entries if each.method == row.method), None)
        if own is None or row.budget not in own.budgets:
            return False
        is_planned = row.learning_rate in own.learning_rates and row.seed < self.num_seeds
        return is_planned or self.plan == "done"


def next_trials(grid: Grid, rows: Iterable[TrialRow]) -> list[Trial]:
    """Trials of the first stage that is not done, without those that are; empty at the end.

    The full plan is every combination. The staged one has three stages: every rate with one seed
    at the method's middle budget; then all seeds at its two best rates there; then its other
    budgets with all seeds at its best rate. The plan done runs nothing: it judges what is there.
    Methods take turns, so that a comparison that is stopped early has some trials of each.
    """
    return _stage(grid, rows)[1]


def num_left(grid: Grid, rows: Iterable[TrialRow]) -> int:
    """How many trials are still to come: at most that many, where a later stage has some done."""
    number, left = _stage(grid, rows)
    # Which trials the later stages hold is not known yet, but how many.
    return len(left) + sum(sum(grid.stage_sizes(each)[number + 1 :]) for each in grid.entries)


@dataclass(frozen=True)
class Planned:
    """A trial to come: of a later stage only its method and budget are known."""

    method: str
    budget: int
    stage: str  # its name as the start of a list; empty for a plan of one stage


def planned(grid: Grid, rows: Iterable[TrialRow]) -> list[Planned]:
    """All trials to come, in the order in which they would run.

    Where a later stage has some done already, they are among them: which ones it consists of is
    not known before its turn.
    """
    number, left = _stage(grid, rows)
    name = _stage_name(grid, number)
    found = [Planned(trial.method, trial.budget, name) for trial in left]
    for later in range(number + 1, max(len(grid.stage_sizes(each)) for each in grid.entries)):
        turns = [
            [Planned(entry.method, budget, _stage_name(grid, later)) for budget in budgets]
            for entry in grid.entries
            if (budgets := _budgets_of_stage(grid, entry, later))
        ]
        found += [each for each in chain.from_iterable(zip_longest(*turns)) if each is not None]
    return found


def _stage_name(grid: Grid, number: int) -> str:
    names = ("rates of ", "seeds of ", "budgets of ")
    return names[number] if grid.plan == "staged" and number < len(names) else ""


def _budgets_of_stage(grid: Grid, entry: Entry, number: int) -> list[int]:
    """The budget of each trial of a later stage of the staged plan."""
    middle = sorted(entry.budgets)[len(entry.budgets) // 2]
    others = [budget for budget in entry.budgets if budget != middle] or [middle]
    size = grid.stage_sizes(entry)[number]
    return [middle] * size if number < 2 else [others[place % len(others)] for place in range(size)]


def _stage(grid: Grid, rows: Iterable[TrialRow]) -> tuple[int, list[Trial]]:
    """The first stage that is not done, from 0, and what is left of it."""
    done = {row.trial: row for row in rows}
    num_stages = max(len(grid.stage_sizes(entry)) for entry in grid.entries)
    plan = _full if grid.plan == "full" else _staged
    for number in range(num_stages):
        stages = [plan(entry, grid.num_seeds, number, done) for entry in grid.entries]
        turns = chain.from_iterable(zip_longest(*stages))
        if left := [trial for trial in turns if trial is not None and trial not in done]:
            return number, left
    return num_stages, []


def _full(entry: Entry, num_seeds: int, number: int, done: Done) -> list[Trial]:
    return [
        Trial(entry.method, budget, rate, seed)
        for seed in range(num_seeds)
        for budget in entry.budgets
        for rate in entry.learning_rates
    ]


def _staged(entry: Entry, num_seeds: int, number: int, done: Done) -> list[Trial]:
    """A stage of the staged plan, of one method; all earlier ones are done."""
    middle = sorted(entry.budgets)[len(entry.budgets) // 2]
    first = [Trial(entry.method, middle, rate, 0) for rate in entry.learning_rates]
    if number == 0:
        return first
    best = _best_rates(done[trial] for trial in first)[:2]
    # By seed, so that a comparison that is stopped has the same seeds of both rates.
    seeds = [
        Trial(entry.method, middle, rate, seed) for seed in range(1, num_seeds) for rate in best
    ]
    if number == 1:
        return seeds
    tried = [Trial(entry.method, middle, rate, 0) for rate in best] + seeds
    finalist = _best_rates(done[trial] for trial in tried)[0]
    return [
        Trial(entry.method, budget, finalist, seed)
        for seed in range(num_seeds)
        for budget in entry.budgets
        if budget != middle
    ]


def _best_rates(rows: Iterable[TrialRow]) -> list[float]:
    """The rates, lowest mean validation loss first; a failed trial counts as infinite."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        loss = math.inf if row.validation_loss is None else row.validation_loss
        losses.setdefault(row.learning_rate, []).append(loss)
    return sorted(losses, key=lambda rate: (sum(losses[rate]) / len(losses[rate]), rate))
