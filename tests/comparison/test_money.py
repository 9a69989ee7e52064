"""What a budget of money buys, counted by hand: a trial takes seconds, a second costs a cent."""

from __future__ import annotations

from pathlib import Path

import pytest
from trial_rows import row

from kpsvd_tune.comparison.account import Account, recorded_seconds
from kpsvd_tune.comparison.money import Forecast, Price, Purse
from kpsvd_tune.comparison.plan import Entry, Grid, next_trials, planned
from kpsvd_tune.errors import CheckpointError, InputError
from kpsvd_tune.report.comparison import Trial, TrialRow

RATES = (1e-3, 2e-3)


def grid_of(plan: str = "full", budgets: tuple[int, ...] = (100,), num_seeds: int = 2) -> Grid:
    return Grid([Entry(name, budgets, RATES) for name in ("kpsvd", "lora")], num_seeds, plan)


def purse_of(
    amount: float,
    rows: list[TrialRow] | None = None,
    spent: float = 0.0,
    share: float = 1.0,
    scoring: float = 0.0,
) -> Purse:
    forecast = Forecast(rows or [], lambda: (5.0, 20.0), scoring)
    return Purse(Price(amount, 36.0, "EUR", share), forecast, lambda: spent)


def done(method: str, seconds: float, seed: int = 0, budget: int = 100) -> TrialRow:
    return row(method, budget, RATES[0], seed, device_seconds=seconds)


def trial(method: str = "lora", seed: int = 0) -> Trial:
    return Trial(method, 100, RATES[0], seed)


def test_a_trial_takes_what_its_own_kind_took_at_most() -> None:
    rows = [done("lora", 10.0), done("lora", 14.0, 1), done("kpsvd", 30.0, budget=200)]
    found = Forecast(rows, lambda: (5.0, 20.0))
    assert found.seconds("lora", 100) == pytest.approx(1.1 * 14)
    # Of the same method at another budget, then of any.
    assert found.seconds("kpsvd", 100) == pytest.approx(1.3 * 30)
    assert found.seconds("pissa", 100) == pytest.approx(1.3 * 30)
    assert found.basis == "by the 3 that are done"


def test_before_the_first_trial_the_upper_end_of_the_estimate_counts() -> None:
    found = Forecast([], lambda: (5.0, 20.0))
    assert found.seconds("lora", 100) == 20.0
    assert found.basis == "by the estimate of `plan`, 5 s to 20 s each"


def test_the_estimate_is_not_asked_for_where_trials_tell() -> None:
    def fails() -> tuple[float, float]:
        raise AssertionError

    assert Forecast([done("lora", 10.0)], fails).seconds("pissa", 1) == pytest.approx(13.0)


def test_money_buys_whole_trials_in_order() -> None:
    # 0.65 at a cent a second are 65 s: three trials of 20 s.
    bought, rest = purse_of(0.65).split(planned(grid_of(), []))
    assert [each.method for each in bought] == ["kpsvd", "lora", "kpsvd"]
    assert len(rest) == 5


def test_what_is_spent_is_no_longer_there() -> None:
    bought, _ = purse_of(0.65, spent=30.0).split(planned(grid_of(), []))
    assert len(bought) == 1


def test_the_first_that_does_not_fit_ends_it() -> None:
    # kpsvd takes 44 s and lora 11 s: after both 5 s are left, which a lora alone would not have.
    rows = [done("kpsvd", 40.0), done("lora", 10.0)]
    bought, rest = purse_of(0.60, rows).split(planned(grid_of(num_seeds=3), rows)[:4])
    assert [each.method for each in bought] == ["kpsvd", "lora"]
    assert [each.method for each in rest] == ["kpsvd", "lora"]


def test_trials_that_share_a_device_cost_a_part_of_it() -> None:
    bought, _ = purse_of(0.65, share=0.5).split(planned(grid_of(), []))
    assert len(bought) == 6


def test_a_score_is_paid_with_its_trial() -> None:
    bought, _ = purse_of(0.65, scoring=12.0).split(planned(grid_of(), []))
    assert len(bought) == 2


def test_money_for_scores_that_are_to_come_is_kept_back() -> None:
    forecast = Forecast([], lambda: (5.0, 20.0), scoring=12.0)
    # 65 s are left, and 24 of them for the scores of two trials: one more takes 20 and 12 s.
    purse = Purse(Price(1.05, 36.0, "EUR"), forecast, lambda: 40.0, unscored=lambda: 2)
    assert purse.split(planned(grid_of(), []))[0] == planned(grid_of(), [])[:1]
    assert purse.may_start(trial())
    assert not purse.may_start(trial(seed=1))
    # Scoring itself takes what was kept back for it: 65 s hold five at a time.
    assert [purse.may_score() for _ in range(6)] == [True] * 5 + [False]
    purse.scored()
    assert purse.may_score()
    shared = Purse(Price(0.11, 36.0, "EUR", share=0.25), forecast, lambda: 0.0)
    assert not shared.may_score()


def test_a_trial_that_failed_tells_no_time() -> None:
    failed = row("lora", 100, RATES[0], device_seconds=2.0, failed="step 2: not finite")
    found = Forecast([failed], lambda: (5.0, 20.0))
    assert found.seconds("lora", 100) == 20.0
    assert found.basis.startswith("by the estimate of `plan`")


def test_no_trial_starts_that_would_go_over() -> None:
    purse = purse_of(0.20)
    assert purse.may_start(trial())
    purse.ended(trial())
    short = purse_of(0.199)
    assert not short.may_start(trial())
    assert short.refused == trial()


def test_trials_that_run_hold_their_money(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("kpsvd_tune.comparison.money.time.monotonic", lambda: now[0])
    purse = purse_of(0.45)
    assert purse.may_start(trial(seed=0))
    assert purse.may_start(trial(seed=1))
    assert not purse.may_start(trial(seed=2))
    # Ten seconds later each still needs ten, and nothing was paid yet: 10 + 10 + 20 <= 45.
    now[0] = 110.0
    assert purse.may_start(trial(seed=2))
    assert purse.refused is None


def test_scoring_stops_where_the_money_does() -> None:
    assert purse_of(0.12, scoring=12.0).may_score()
    assert not purse_of(0.12, spent=1.0, scoring=12.0).may_score()


def test_the_plan_says_what_runs_and_what_is_left_out() -> None:
    grid = grid_of("staged", (100, 200, 400))
    # Rates 4, seeds 4, budgets 8 of 20 s each; 110 s buy five.
    assert purse_of(1.10).plan_lines(grid, []) == [
        "money: 1.10 EUR at 36.00 EUR an hour; 0.00 EUR spent so far; a trial costs up to 0.20 "
        "EUR, by the estimate of `plan`, 5 s to 20 s each",
        "the money buys 5 of the 16 trials to come: rates of kpsvd 2, lora 2; seeds of kpsvd 1",
        "left out: seeds of lora 2, kpsvd 1; budgets of kpsvd 4, lora 4; all of them would take "
        "about 3.20 EUR in all",
    ]


def test_measured_times_refine_the_plan() -> None:
    rows = [done("kpsvd", 5.0), done("lora", 2.0)]
    lines = purse_of(0.30, rows, spent=7.0).plan_lines(grid_of(), rows)
    # 23 s are left; kpsvd takes 5.5 s and lora 2.2 s: all six to come take 23.1 s.
    assert lines == [
        "money: 0.30 EUR at 36.00 EUR an hour; 0.070 EUR spent so far; a trial costs up to 0.022 "
        "EUR to 0.055 EUR, by the 2 that are done",
        "the money buys 5 of the 6 trials to come: kpsvd 3, lora 2",
        "left out: lora 1; all of them would take about 0.30 EUR in all",
    ]


def test_a_plan_that_is_done_says_so() -> None:
    grid = Grid([Entry("lora", (100,), RATES[:1])], 1, "full")
    rows = [done("lora", 5.0)]
    assert purse_of(0.30, rows).plan_lines(grid, rows)[-1] == "every trial of the plan is done"


def test_money_that_buys_nothing_is_refused_where_nothing_is_there() -> None:
    with pytest.raises(
        InputError,
        match=r"--money: 0\.10 EUR buys no trial: 0\.010 EUR is spent \(preparing counts\) and one "
        r"costs up to 0\.20 EUR \(by the estimate of `plan`, 5 s to 20 s each\); raise --money",
    ):
        purse_of(0.10, spent=1.0).check(grid_of(), [])
    # What is there can be judged.
    rows = [done("lora", 50.0)]
    purse_of(0.10, rows).check(grid_of(), rows)
    purse_of(0.25).check(grid_of(), [])


@pytest.mark.parametrize("plan", ["full", "staged", "done"])
def test_all_trials_to_come_are_planned(plan: str) -> None:
    grid = grid_of(plan, (100, 200, 400), num_seeds=3)
    found = planned(grid, [])
    assert len(found) == grid.summary()["trials"]
    first = next_trials(grid, [])
    assert [(e.method, e.budget) for e in found[: len(first)]] == [
        (t.method, t.budget) for t in first
    ]


def test_the_account_adds_up_over_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("kpsvd_tune.comparison.account.time.monotonic", lambda: now[0])
    # A folder of an earlier version: its rows are what is known.
    rows = [done("lora", 30.0), row("kpsvd", init_seconds=4.0, wall_seconds=8.0)]
    account = Account(tmp_path, rows, devices=2, since=-5.0)
    assert account.device_seconds == 42.0
    now[0] = 10.0
    account.tick(0)  # preparing holds one device, from 5 s before the account was opened
    now[0] = 15.0
    account.tick(4)  # four trials share two
    assert account.device_seconds == 42.0 + 15.0 + 10.0
    account.write()
    now[0] = 1000.0
    again = Account(tmp_path, rows, devices=2, since=1000.0)
    assert again.device_seconds == recorded_seconds(tmp_path, rows) == 67.0


def test_an_account_is_written_while_trials_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("kpsvd_tune.comparison.account.time.monotonic", lambda: now[0])
    account = Account(tmp_path, [], devices=1, since=0.0)
    for now[0] in (0.5, 1.0, 1.5, 2.0, 2.5):
        account.tick()
    # As after kill -9: nothing was written at the end.
    assert recorded_seconds(tmp_path, []) == 2.0


def test_a_damaged_account_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "account.json").write_text("{")
    with pytest.raises(CheckpointError, match="remove it, and the times of the finished trials"):
        recorded_seconds(tmp_path, [])
