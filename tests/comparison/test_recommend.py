"""The recommendation: what is taken, why, and that nothing undecided is said to be decided."""

from __future__ import annotations

import re
from typing import Any

from trial_rows import row

from kpsvd_tune.comparison.verdict import compare_rows
from kpsvd_tune.report.comparison import Recommendation, TrialRow

ONE_RATE = "whether another rate is better: 0.001 is the only one tried"


def recommendation(rows: list[TrialRow], **changes: Any) -> Recommendation:
    base = changes.pop("base", {"validation_loss": 2.0})
    return compare_rows(
        rows, model="tiny", steps=4, base=base, num_warmup=1, max_grad_norm=1.0, **changes
    ).recommendation


def trials(method: str, loss: float, noise: float = 0.0, **changes: Any) -> list[TrialRow]:
    """Three seeds; the noise differs from seed to seed and has mean zero."""
    return [
        row(method, seed=seed, loss=loss + 0.01 * seed + noise * (seed - 1), **changes)
        for seed in range(3)
    ]


def test_a_proved_difference_names_the_next_best_with_its_interval():
    found = recommendation(
        [*trials("lora", 1.0), *trials("kpsvd", 1.05, 0.001), *trials("pissa", 1.2, 0.001)]
    )
    assert found.text.startswith(
        "On this data take lora at 0.001 with 100 trainable parameters, because its validation "
        "loss after 4 steps is 1.0100 (test loss 1.1100, which no choice looked at), where the "
        "base model has 2.0000; every other method's is higher, the next one's, that of kpsvd, by "
        "0.0500 nats, 95 % interval +0.04"
    )
    assert found.undecided == (ONE_RATE,)


def test_what_is_not_proved_is_not_decided():
    found = recommendation(
        [*trials("lora", 1.0), *trials("kpsvd", 1.01, 0.1), *trials("pissa", 1.2, 0.001)]
    )
    assert "take lora" in found.text
    assert found.text.endswith("it is proved lower than that of pissa.")
    open_, *rest = found.undecided
    assert rest == [ONE_RATE]
    assert open_.startswith(
        "whether it is better than kpsvd (loss of kpsvd minus that of lora: +0.0100 nats, 95 % "
    )


def test_one_seed_proves_nothing():
    found = recommendation([row("lora", loss=1.0), row("kpsvd", loss=1.5)])
    assert found.text.endswith("no difference from another method is proved.")
    assert found.undecided == (
        "whether it is better than kpsvd (loss of kpsvd minus that of lora: +0.5000 nats, one "
        "seed)",
        ONE_RATE,
    )


def test_a_difference_is_kpsvd_minus_the_baseline_whoever_is_taken():
    for loss, sign in ((0.5, "-"), (1.5, "+")):
        told, _ = recommendation([row("lora", loss=1.0), row("kpsvd", loss=loss)]).undecided
        assert f"(loss of kpsvd minus that of lora: {sign}0.5000 nats, one seed)" in told
    # With its interval turned round too.
    rows = [*trials("kpsvd", 1.0), *trials("lora", 1.01, 0.1)]
    told, _ = recommendation(rows).undecided
    low, high = map(float, re.findall(r"interval ([+-][\d.]+) to ([+-][\d.]+)", told)[0])
    assert low < -0.01 < 0 < high, told


def test_methods_without_a_seed_in_common_are_not_ranked():
    found = recommendation([row("lora", seed=0, loss=1.0), row("kpsvd", seed=1, loss=1.5)])
    assert found.undecided == (
        "whether it is better than kpsvd (no seed in common)",
        ONE_RATE,
    )


def test_many_seeds_beat_one_lucky_one():
    found = recommendation([*trials("lora", 1.0), row("kpsvd", seed=0, loss=0.5)])
    assert "take lora at" in found.text
    assert any("minus that of lora: -0.5000 nats, one seed" in each for each in found.undecided)


def test_nothing_is_taken_that_is_no_better_than_the_base():
    found = recommendation([*trials("lora", 2.5), *trials("kpsvd", 2.6)])
    assert found.text == (
        "On this data take none of them: the best, lora at 0.001 with 100 trainable parameters, "
        "has a validation loss of 2.5100 after 4 steps, and the base model has 2.0000."
    )


def test_edges_sizes_and_missing_trials_are_named():
    rows = [
        *trials("lora", 1.0, rate=1e-3, trainable_parameters=100),
        *trials("lora", 1.1, rate=1e-4, trainable_parameters=100),
        *trials("kpsvd", 1.2, 0.001, trainable_parameters=64),
    ]
    found = recommendation(rows, num_missing=5)
    assert found.undecided == (
        "everything: at least 5 trials still to come",
        "what equal sizes would show: parameters trained here are kpsvd 64, lora 100",
        "whether a rate beyond 0.001 is better: it is the last one tried",
    )


def test_fewer_parameters_that_may_do_as_well_are_named():
    rows = [*trials("lora", 1.0, budget=200), *trials("lora", 1.002, 0.05, budget=100)]
    found = recommendation(rows)
    assert "no other method was tried with as many" in found.text
    open_, *rest = found.undecided
    assert rest == [ONE_RATE]
    assert open_.startswith(
        "whether 100 parameters would do as well (loss of 100 minus that of 200: +0.0020 nats, 95 "
    )


def test_a_comparison_without_a_base_or_test_rows_says_nothing_of_them():
    rows = [row("lora", test_loss=None), row("kpsvd", loss=1.5, test_loss=None)]
    found = recommendation(rows, base={})
    assert "base model" not in found.text
    assert "test loss" not in found.text
