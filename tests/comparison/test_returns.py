"""What money buys: every figure by hand."""

from __future__ import annotations

from typing import Any

import pytest
from trial_rows import row

from kpsvd_tune.comparison.verdict import compare_rows
from kpsvd_tune.report.comparison import Comparison, Return, Spent, TrialRow, TrialScore


def verdict(rows: list[TrialRow], **changes: Any) -> Comparison:
    settings: dict[str, Any] = {
        "model": "tiny",
        "steps": 4,
        "base": {"validation_loss": 2.0},
        "num_warmup": 1,
        "max_grad_norm": 1.0,
        "price_per_hour": 36.0,
        "currency": "EUR",
    }
    return compare_rows(rows, **(settings | changes))


def seeds(method: str, losses: list[float], budget: int = 100, **changes: Any) -> list[TrialRow]:
    return [row(method, budget, 1e-3, seed, loss, **changes) for seed, loss in enumerate(losses)]


def scored(shares: tuple[float, ...], asked: str = "greedy") -> TrialScore:
    return TrialScore(
        "exact_match", "exact_match", asked, sum(shares) / len(shares), shares, 0, 3.0
    )


def of(found: Comparison, method: str, budget: int = 100) -> Return:
    return next(each for each in found.returns if (each.method, each.budget) == (method, budget))


def test_a_run_costs_its_device_hours_and_brings_nats() -> None:
    # Start 4 s and 4 steps of 2 s: 12 s, at one cent a second. 2.0 - 1.0 nats for 0.12.
    found = of(verdict(seeds("lora", [1.0])), "lora")
    assert found.hours == pytest.approx(12 / 3600)
    assert found.cost == pytest.approx(0.12)
    assert found.gain == pytest.approx(1.0)
    cells = found.in_words("EUR")
    assert cells["device time"] == "12 s"
    assert cells["cost"] == "0.12 EUR"
    assert cells["minus the base"] == "-1.0000 nats"
    # 1.0 / 0.12
    assert cells["gain per EUR"] == "8.33 nats"
    assert cells["against the best baseline"] == "is the best baseline"
    assert cells["energy"] == "–"


def test_without_a_price_an_hour_is_what_is_paid() -> None:
    found = of(verdict(seeds("lora", [1.0]), price_per_hour=None), "lora")
    cells = found.in_words("EUR")
    assert (found.cost, cells["cost"]) == (None, "–")
    # One nat in 12 s: 300 in an hour.
    assert cells["gain per hour"] == "300 nats"


def test_more_money_than_the_baseline_is_held_against_what_it_brings() -> None:
    # Start 4 s and 16 s of steps: 20 s, 0.08 more than LoRA's, for 0.1 nats.
    rows = seeds("lora", [1.0, 1.2]) + seeds("kpsvd", [0.9, 1.1], seconds_per_step=4.0)
    found = of(verdict(rows), "kpsvd")
    assert found.baseline == "lora"
    assert found.extra_hours == pytest.approx(8 / 3600)
    assert found.extra_gain is not None
    assert found.extra_gain.mean == pytest.approx(0.1)
    assert found.in_words("EUR")["against the best baseline"] == (
        "lora: -0.1000 nats for 0.080 EUR more: 1.25 nats per EUR"
    )


def test_a_cheaper_run_says_so_and_has_no_rate() -> None:
    rows = seeds("lora", [1.0, 1.2]) + seeds("kpsvd", [1.1, 1.3], seconds_per_step=1.0)
    found = of(verdict(rows), "kpsvd")
    assert found.in_words("EUR")["against the best baseline"] == (
        "lora: +0.1000 nats for 0.040 EUR less"
    )


def test_what_is_lost_has_no_rate_for_the_money() -> None:
    cells = of(verdict(seeds("lora", [2.5])), "lora").in_words("EUR")
    assert (cells["minus the base"], cells["gain per EUR"]) == ("+0.5000 nats", "–")


def test_points_are_bought_beside_nats() -> None:
    rows = [row("lora", loss=1.0, score=scored((1.0, 0.0)))]
    cells = of(verdict(rows, base_score=scored((0.0, 0.0))), "lora").in_words("EUR")
    assert cells["minus the base"] == "-1.0000 nats, +50.0 points"
    # 50 / 0.12
    assert cells["gain per EUR"] == "8.33 nats, 417 points"


def test_the_interval_of_a_gain_is_that_of_the_loss_turned_round() -> None:
    rows = seeds("lora", [1.0, 1.2]) + seeds("kpsvd", [0.9, 1.0])
    found = verdict(rows)
    (change,) = (each for each in found.differences if each.method == "kpsvd")
    gain = of(found, "kpsvd").extra_gain
    assert gain is not None
    assert gain.mean == pytest.approx(0.15)
    assert change.loss.low is not None
    assert gain.high == pytest.approx(-change.loss.low)
    assert gain.deviation == change.loss.deviation


def test_the_baseline_is_the_best_one_at_the_budget() -> None:
    rows = seeds("lora", [1.0]) + seeds("pissa", [0.8]) + seeds("kpsvd", [0.9])
    found = verdict(rows)
    assert [of(found, name).baseline for name in ("lora", "pissa", "kpsvd")] == [
        "pissa",
        None,
        "pissa",
    ]


def test_energy_is_the_median_where_every_seed_tells_it() -> None:
    rows = [
        row("lora", seed=seed, loss=1.0, energy_joules=joules)
        for seed, joules in enumerate((3600.0, 7200.0, 36_000.0))
    ]
    found = verdict(rows)
    assert of(found, "lora").energy_joules == 7200.0
    assert of(found, "lora").in_words("EUR")["energy"] == "2 Wh"
    assert found.spent is not None
    assert found.spent.energy_joules == 46_800.0
    one_silent = verdict([*rows[:2], row("lora", seed=2, loss=1.0)])
    assert of(one_silent, "lora").energy_joules is None
    assert one_silent.spent is not None
    assert one_silent.spent.energy_joules is None


def test_the_smallest_within_one_standard_error() -> None:
    # The best has mean 1.0 and deviation 0.2 over 4 seeds: its standard error is 0.1.
    best = seeds("lora", [0.8, 1.2, 0.8, 1.2], budget=400)
    deviation = 0.2 * (4 / 3) ** 0.5
    rows = best + seeds("kpsvd", [1.11] * 4, budget=200) + seeds("kpsvd", [1.2] * 4, budget=100)
    found = verdict(rows).smallest
    assert found is not None
    assert found.standard_error == pytest.approx(deviation / 2)  # 0.1155: 1.11 is within, 1.2 not
    assert (found.method, found.budget, found.best) == ("kpsvd", 200, "lora")
    assert found.in_words() == (
        "the smallest adapter within one standard error of the best validation loss: kpsvd with "
        "200 parameters (1.1100); the best, lora with 400, has 1.0000 ± 0.1155"
    )
    none = verdict(best + seeds("kpsvd", [1.2] * 4, budget=200)).smallest
    assert none is not None
    assert none.in_words().startswith("no smaller adapter is within one standard error of the best")


def test_one_seed_has_no_standard_error() -> None:
    assert verdict(seeds("lora", [1.0]) + seeds("lora", [1.2], budget=50)).smallest is None


def test_few_seeds_do_not_compete_for_the_smallest() -> None:
    rows = seeds("lora", [0.9, 1.1]) + seeds("kpsvd", [1.0], budget=10)
    found = verdict(rows).smallest
    assert found is not None
    assert found.method == "lora"


def test_scores_choose_the_smallest_where_all_have_them() -> None:
    # Scores 0.5 and 1.0 of the large one: mean 0.75, standard error 0.25; 0.5 is within.
    rows = [
        row("lora", 200, seed=0, loss=1.0, score=scored((0.0, 1.0))),
        row("lora", 200, seed=1, loss=1.0, score=scored((1.0, 1.0))),
        row("kpsvd", 100, seed=0, loss=1.5, score=scored((0.0, 1.0))),
        row("kpsvd", 100, seed=1, loss=1.5, score=scored((0.0, 1.0))),
    ]
    found = verdict(rows, base_score=scored((0.0, 0.0))).smallest
    assert found is not None
    assert (found.measure, found.method, found.value) == ("score", "kpsvd", 0.5)
    assert found.standard_error == pytest.approx(0.25)


def test_what_was_spent_is_the_account_and_else_the_trials() -> None:
    rows = [row(seed=0, device_seconds=30.0), row(seed=1, device_seconds=42.0)]
    found = verdict(rows).spent
    # 72 s at a cent a second; a trial of 36 s costs 0.36, so 10 buy 27.
    assert found == Spent(2, 72.0, 36.0, 36.0)
    assert found.in_words("EUR") == (
        "2 trials, 1 min 12 s of device time in all, 0.72 EUR; 0.36 EUR a trial: 10.00 EUR would "
        "pay for 27 such trials"
    )
    with_money = verdict(rows, device_seconds=100.0, money=2.0).spent
    assert with_money is not None
    assert with_money.in_words("EUR") == (
        "2 trials, 1 min 40 s of device time in all, 1.00 EUR; 0.36 EUR a trial; the budget was "
        "2.00 EUR: 2.00 EUR would pay for 5 such trials"
    )
    # Rows of older versions: the start of 4 s and the training of 8 s.
    assert verdict([row()]).spent == Spent(1, 12.0, 12.0, 36.0)


def test_without_a_price_the_time_is_told() -> None:
    found = verdict([row(device_seconds=30.0)], price_per_hour=None).spent
    assert found is not None
    assert found.in_words("EUR") == (
        "1 trial, 30 s of device time in all, 30 s a trial; no price was given"
    )
