"""What would decide what is open, with the numbers by hand."""

from __future__ import annotations

from typing import Any

import pytest
from trial_rows import row

from kpsvd_tune.comparison.missing import rows_needed
from kpsvd_tune.comparison.statistics import seeds_needed
from kpsvd_tune.comparison.verdict import compare_rows
from kpsvd_tune.report.comparison import Recommendation, ScoreDifference, TrialRow, TrialScore


def advice(rows: list[TrialRow], **changes: Any) -> Recommendation:
    return compare_rows(
        rows,
        model="tiny",
        steps=4,
        base={"validation_loss": 2.0},
        num_warmup=1,
        max_grad_norm=1.0,
        **changes,
    ).recommendation


def seeds(method: str, losses: list[float], **changes: Any) -> list[TrialRow]:
    return [row(method, seed=seed, loss=loss, **changes) for seed, loss in enumerate(losses)]


def scored(*shares: float) -> TrialScore:
    return TrialScore(
        "exact_match", "exact_match", "greedy", sum(shares) / len(shares), shares, 0, 1
    )


def test_seeds_are_counted_by_the_t_distribution() -> None:
    # Mean as large as the deviation: t / sqrt(n) falls below 1 between 6 (2.571 / 2.449) and 7
    # (2.447 / 2.646) seeds.
    assert seeds_needed(1.0, 1.0) == 7
    assert seeds_needed(-1.0, 1.0) == 7
    assert seeds_needed(1.0, 0.01) == 2
    # 31 seeds: 2.042 / 5.568 = 0.367.
    assert seeds_needed(0.368, 1.0) == 31
    assert seeds_needed(0.366, 1.0) is None
    assert seeds_needed(0.0, 1.0) is None


def test_rows_are_counted_by_the_normal_distribution() -> None:
    # 100 questions, 2 points with an error of 4: (1.96 * 2)^2 = 15.37 times as many.
    change = ScoreDifference("a", 1, "b", 1, 0.02, 0.04, 100, 2)
    assert rows_needed(change) == 1537
    assert rows_needed(ScoreDifference("a", 1, "b", 1, 0.0, 0.04, 100, 2)) is None


def test_one_seed_asks_for_more() -> None:
    found = advice(seeds("lora", [1.0]) + seeds("kpsvd", [1.1]))
    assert found.missing == (
        "seeds: kpsvd and lora need two or more in common to be told apart; pass --seeds 3",
    )


def test_seeds_that_would_decide_are_counted() -> None:
    # Differences 0.1, 0.3: mean 0.2, deviation 0.1414; 0.707 of the mean: 5 seeds, for
    # 2.776 * 0.707 / sqrt(5) = 0.878 and with 4 it is 1.125.
    found = advice(seeds("lora", [1.0, 1.0]) + seeds("kpsvd", [1.1, 1.3]))
    assert found.missing == (
        "seeds: about 5, now 2, to tell kpsvd from lora if their difference stays +0.2000 nats; "
        "pass --seeds 5",
    )


def test_methods_that_no_number_of_seeds_tells_apart_are_equal() -> None:
    found = advice(seeds("lora", [1.0, 1.0]) + seeds("kpsvd", [0.5, 1.501]))
    assert found.missing == (
        "seeds: more than 30 to tell kpsvd from lora (+0.0005 nats): take the cheaper of the two",
    )


def test_nothing_but_a_rate_is_open_where_all_is_proved() -> None:
    found = advice(seeds("lora", [1.0, 1.01, 0.99]) + seeds("kpsvd", [1.2, 1.21, 1.19]))
    one_rate = "whether another rate is better: 0.001 is the only one tried"
    assert (found.undecided, found.missing) == ((one_rate,), ())


@pytest.mark.parametrize(
    ("rates", "best", "told"),
    [((1e-3, 2e-3), 2e-3, "0.002+0.004"), ((1e-3, 2e-3, 4e-3), 1e-3, "0.001+0.0005")],
)
def test_a_rate_at_the_edge_asks_for_the_next_one(
    rates: tuple[float, ...], best: float, told: str
) -> None:
    found = advice([row("lora", rate=each, loss=1.0 if each == best else 1.1) for each in rates])
    assert found.missing == (
        f"rates: lora was best at the last rate tried, {best:g}; add the next one, as in "
        f"--methods lora:rates={told}",
    )


def test_a_loss_that_still_falls_asks_for_steps() -> None:
    curve = ((0, 2.0), (5, 1.2), (10, 1.0))
    found = advice(seeds("lora", [1.0], validation_losses=curve))
    assert found.missing == (
        "steps: the validation loss of lora still fell by 0.2000 nats from step 5 to the last, 10; "
        "raise train.max_steps or train.epochs",
    )
    level = ((0, 2.0), (5, 1.004), (10, 1.0))
    assert advice(seeds("lora", [1.0], validation_losses=level)).missing == ()
    # A lead that is larger than what still fell stays.
    led = advice(seeds("lora", [1.0], validation_losses=curve) + seeds("kpsvd", [1.3]))
    assert not any(each.startswith("steps") for each in led.missing)


def test_no_gain_asks_for_one() -> None:
    found = advice(seeds("lora", [2.5]))
    assert found.lines == ()
    assert found.missing == ("a gain: try lower rates, more steps (train.max_steps) or more rows",)


def test_trials_to_come_are_missing() -> None:
    assert advice(seeds("lora", [1.0]), num_missing=3).missing == (
        "trials: at least 3 are still to come; the same command runs them",
    )


def test_a_score_chooses_the_method_and_pairs_the_questions() -> None:
    rows = [
        row("lora", loss=1.0, score=scored(1, 0, 0, 0)),
        row("kpsvd", loss=1.1, score=scored(1, 1, 1, 0)),
    ]
    found = compare_rows(
        rows,
        model="tiny",
        steps=4,
        base={"validation_loss": 2.0},
        num_warmup=1,
        max_grad_norm=1.0,
        base_score=scored(0, 0, 0, 0),
    )
    text = found.recommendation.text
    assert text.startswith(
        "On this data take kpsvd at 0.001 with 100 trainable parameters, because its score on "
        "exact_match after 4 steps is 75.0 %, where the base model has 0.0 %; no difference from "
        "another method is proved; its validation loss is 1.1000, the lowest is that of lora at "
    )
    (change,) = (each for each in found.score_differences if each.method == "kpsvd")
    # Differences 0, 1, 1, 0: mean 0.5, deviation 0.5774, error 0.2887.
    assert (change.change, change.num_questions) == (0.5, 4)
    assert change.stderr == pytest.approx(0.288675, abs=1e-6)
    assert change.in_words() == ("+50.0 points (95 % interval -6.6 to +106.6; 4 questions, 1 seed)")
    # (1.96 * 0.2887 / 0.5)^2 = 1.28 times 4.
    assert found.recommendation.missing == (
        "rows: about 6 questions, now 4, to tell kpsvd from lora if their difference stays +50.0 "
        "points",
    )
    (own, _) = (each for each in found.returns if each.points is not None)
    assert {each.method: each.points for each in found.returns} == {"kpsvd": 75.0, "lora": 25.0}
    assert own.extra_points is not None


def test_a_proved_score_is_named_and_leaves_nothing_but_a_rate_open() -> None:
    rows = [
        row("lora", loss=1.0, score=scored(*[0.0] * 20)),
        row("kpsvd", loss=1.1, score=scored(*[1.0] * 12, *[0.0] * 8)),
    ]
    found = advice(rows, base_score=scored(*[0.0] * 20))
    assert "it is proved higher than that of lora" in found.text
    one_rate = "whether another rate is better: 0.001 is the only one tried"
    assert (found.undecided, found.missing) == ((one_rate,), ())


def test_a_question_counts_by_its_mean_over_the_seeds() -> None:
    rows = [
        row("lora", seed=0, score=scored(0, 0)),
        row("lora", seed=1, score=scored(1, 0)),
        row("kpsvd", seed=0, score=scored(1, 1)),
        row("kpsvd", seed=1, score=scored(1, 0)),
    ]
    found = compare_rows(
        rows, model="t", steps=4, base={}, num_warmup=1, max_grad_norm=1.0, base_score=scored(0, 0)
    )
    (change,) = (each for each in found.score_differences if each.method == "kpsvd")
    # Question 1: (1 - 0 + 1 - 1) / 2 = 0.5; question 2: (1 - 0 + 0 - 0) / 2 = 0.5.
    assert (change.change, change.stderr, change.num_seeds) == (0.5, 0.0, 2)


def test_scores_that_were_asked_in_another_way_do_not_count() -> None:
    other = TrialScore("exact_match", "exact_match", "3 worked examples", 1.0, (1.0,), 0, 1.0)
    found = compare_rows(
        [row("lora", score=other)],
        model="t",
        steps=4,
        base={},
        num_warmup=1,
        max_grad_norm=1.0,
        base_score=scored(0),
    )
    assert found.summaries[0].score is None
    assert "validation loss" in found.recommendation.text


def test_nothing_is_taken_that_scores_no_higher_than_the_base() -> None:
    found = advice([row("lora", score=scored(0, 1))], base_score=scored(1, 1))
    assert found.text == (
        "On this data take none of them: the best, lora at 0.001 with 100 trainable parameters, "
        "scores 50.0 % on exact_match after 4 steps, and the base model 100.0 %."
    )
