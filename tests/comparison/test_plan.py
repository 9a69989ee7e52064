"""Which trials come next."""

from __future__ import annotations

import pytest
from trial_rows import row

from kpsvd_tune.comparison.plan import Entry, Grid, next_trials, num_left
from kpsvd_tune.report.comparison import Trial, TrialRow

RATES = (1e-3, 2e-3, 4e-3)
LOSSES = {1e-3: 1.2, 2e-3: 1.0, 4e-3: 1.1}


def grid_of(methods: list[str], budgets: list[int], num_seeds: int, plan: str) -> Grid:
    return Grid([Entry(method, budgets, RATES) for method in methods], num_seeds, plan)


def done(trials: list[Trial], failing: float | None = None) -> list[TrialRow]:
    return [
        row(
            t.method,
            t.budget,
            t.learning_rate,
            t.seed,
            None if t.learning_rate == failing else LOSSES[t.learning_rate],
        )
        for t in trials
    ]


def run_out(grid: Grid, failing: float | None = None) -> list[list[Trial]]:
    rows: list[TrialRow] = []
    stages = []
    while trials := next_trials(grid, rows):
        stages.append(trials)
        rows += done(trials, failing)
    return stages


def test_the_full_plan_is_every_combination_once() -> None:
    grid = grid_of(["a", "b"], [100, 200], 2, "full")
    (stage,) = run_out(grid)
    assert len(stage) == len(set(stage)) == 2 * 2 * 3 * 2 == grid.summary()["trials"]
    assert [trial.method for trial in stage[:4]] == ["a", "b", "a", "b"]


def test_the_staged_plan_spends_seeds_on_the_best_rates() -> None:
    grid = grid_of(["a", "b"], [100, 200, 400], 3, "staged")
    rates, seeds, budgets = run_out(grid)
    assert {(t.budget, t.seed) for t in rates} == {(200, 0)}
    assert {(t.budget, t.learning_rate, t.seed) for t in seeds} == {
        (200, rate, seed) for rate in (2e-3, 4e-3) for seed in (1, 2)
    }
    assert {(t.budget, t.learning_rate, t.seed) for t in budgets} == {
        (budget, 2e-3, seed) for budget in (100, 400) for seed in (0, 1, 2)
    }
    assert sum(map(len, (rates, seeds, budgets))) == grid.summary()["trials"]


@pytest.mark.parametrize("plan", ["full", "staged", "done"])
def test_what_is_left_is_counted_through_all_stages(plan: str) -> None:
    grid = grid_of(["a", "b"], [100, 200, 400], 3, plan)
    rows: list[TrialRow] = []
    left = [num_left(grid, rows)]
    while trials := next_trials(grid, rows):
        for trial in trials:
            rows += done([trial])
            left.append(num_left(grid, rows))
    assert left == list(range(grid.summary()["trials"], -1, -1))


def test_every_method_gets_the_same_number_of_trials() -> None:
    grid = grid_of(["a", "b", "c"], [100, 200], 2, "staged")
    trials = [trial for stage in run_out(grid) for trial in stage]
    counts = {name: sum(trial.method == name for trial in trials) for name in ("a", "b", "c")}
    assert counts == grid.summary()["trials_per_method"]
    assert len(set(counts.values())) == 1


def test_a_stopped_plan_goes_on_with_what_is_left() -> None:
    grid = grid_of(["a", "b"], [100], 1, "full")
    first = next_trials(grid, [])
    assert next_trials(grid, done(first[:4])) == first[4:]


def test_a_rate_that_failed_is_not_the_best() -> None:
    grid = grid_of(["a"], [100], 2, "staged")
    _, seeds = run_out(grid, failing=2e-3)
    assert {trial.learning_rate for trial in seeds} == {1e-3, 4e-3}


def test_folder_names_are_file_names_of_their_own() -> None:
    names = {
        Trial(method, 100, rate, seed).folder_name
        for method in ("kpsvd", "kpsvd:a=b/c", "lora")
        for rate in RATES
        for seed in (0, 1)
    }
    assert len(names) == 18
    assert not any("/" in name or ":" in name for name in names)


def test_the_plan_done_runs_nothing_and_judges_what_is_there() -> None:
    grid = grid_of(["a"], [100], 1, "done")
    assert next_trials(grid, []) == []
    assert grid.summary()["trials"] == 0
    assert grid.holds(row("a", 100, 0.5, seed=7))
    assert not grid.holds(row("b", 100, 0.5))


def test_other_plans_judge_their_own_trials_alone() -> None:
    grid = grid_of(["a"], [100], 1, "full")
    assert grid.holds(row("a", 100, 2e-3, seed=0))
    assert not grid.holds(row("a", 100, 2e-3, seed=1))
    assert not grid.holds(row("a", 100, 5e-3, seed=0))


def test_rates_that_look_alike_keep_folders_of_their_own() -> None:
    one, other = (Trial("a", 1, rate, 0).folder_name for rate in (0.0012345678, 0.0012345679))
    assert one != other


def test_a_method_has_budgets_and_rates_of_its_own() -> None:
    entries = [Entry("a", [100, 200, 400], RATES), Entry("b", [200], RATES[:2])]
    grid = Grid(entries, 2, "staged").with_budgets({"a": (100, 200, 400), "b": (400,)})
    stages = run_out(grid)
    trials = [trial for stage in stages for trial in stage]
    assert {t.budget for t in trials if t.method == "b"} == {400}
    assert {t.learning_rate for t in trials if t.method == "b"} == set(RATES[:2])
    # Two rates, then the second seed of both; there is no other budget.
    assert grid.summary()["trials_per_method"] == {"a": 3 + 2 + 4, "b": 2 + 2}
    assert len(trials) == grid.summary()["trials"] == 13
    # Methods take turns while both have trials left.
    assert [t.method for t in stages[0]] == ["a", "b", "a", "b", "a"]
    left = [num_left(grid, []), num_left(grid, done(stages[0]))]
    assert left == [13, 8]
    # A method that is done waits for the others, whose stages it does not hold up.
    assert {t.method for t in stages[2]} == {"a"}
