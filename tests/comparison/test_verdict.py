"""What is concluded from trials made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trial_rows import row

from kpsvd_tune.comparison.compare import _conclude
from kpsvd_tune.comparison.verdict import compare_rows
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.comparison import Comparison, TrialRow

BASE = {"validation_loss": 2.0, "test_loss": 2.1, "forgetting_loss": 1.0}


def verdict(rows: list[TrialRow], **changes: Any) -> Comparison:
    settings: dict[str, Any] = {
        "model": "tiny",
        "steps": 4,
        "base": BASE,
        "num_warmup": 1,
        "max_grad_norm": 1.0,
    }
    return compare_rows(rows, **(settings | changes))


def seeds(method: str, losses: list[float], /, budget: int = 100, **changes: Any) -> list[TrialRow]:
    return [row(method, budget, 1e-3, seed, loss, **changes) for seed, loss in enumerate(losses)]


# Of runs that are long enough for every claim.
LONG: dict[str, Any] = {"losses": (2.0, 1.5, 1.2, 1.0) * 5, "grad_norms": (9.0, 2.0, 1.0, 0.5) * 5}


def claim(found: Comparison, word: str) -> Any:
    return next(each for each in found.claims if word in each.text)


def test_the_best_rate_is_chosen_by_validation_and_never_by_test() -> None:
    rows = [
        row(rate=1e-3, loss=1.2, test_loss=0.1),
        row(rate=2e-3, loss=1.0, test_loss=9.0),
        row(rate=4e-3, loss=1.1, test_loss=0.1),
    ]
    (summary,) = verdict(rows).summaries
    assert summary.learning_rate == 2e-3
    assert not summary.is_edge
    assert summary.num_trials == 3
    assert summary.test_loss is not None
    assert summary.test_loss.mean == 9.0


def test_rates_with_fewer_seeds_do_not_compete() -> None:
    rows = [row(rate=2e-3, loss=0.5), *seeds("lora", [1.0, 1.1])]
    (summary,) = verdict(rows).summaries
    assert (summary.learning_rate, summary.validation_loss.n) == (1e-3, 2)


def test_an_edge_and_a_failure_are_told() -> None:
    rows = [row(rate=1e-3, loss=1.0), row(rate=2e-3, loss=None, failed="step 3: the loss is nan")]
    found = verdict(rows)
    assert found.summaries[0].is_edge
    assert any("at the edge of those tried" in note for note in found.notes)
    assert any("step 3: the loss is nan" in note for note in found.notes)


def test_figures_of_a_summary() -> None:
    (summary,) = verdict([row()], price_per_hour=1800.0, currency="EUR").summaries
    # After one warm-up step the norms are 2, 1, 0.5; two of all four are above 1.
    assert summary.gradient_variation.mean == pytest.approx(0.6547, abs=1e-3)
    assert summary.clipped_share == 0.5
    assert summary.steps_to_reference is not None
    assert summary.steps_to_reference.mean == 10.0
    assert summary.seconds_to_reference == 20.0
    # Four steps of two seconds and four of start, at half a euro a second.
    assert summary.cost == pytest.approx(6.0)


def test_differences_are_paired_by_seed() -> None:
    rows = seeds("kpsvd", [1.1, 2.1, 3.1]) + seeds("lora", [1.0, 2.0, 3.0])
    found = verdict(rows)
    difference = next(d for d in found.differences if d.method == "kpsvd" and d.other == "lora")
    assert difference.loss.mean == pytest.approx(0.1)
    # The seeds differ by much and the pairs do not.
    assert difference.loss.low == pytest.approx(0.1)
    assert difference.loss.high == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ([0.9, 0.91, 0.89], "held"),
        ([1.2, 1.21, 1.19], "not held"),
        ([1.02, 0.98, 1.01], "undecided"),
        ([1.2], "undecided"),
    ],
)
def test_quality(ours: list[float], expected: str) -> None:
    rows = seeds("kpsvd", ours) + seeds("lora", [1.0, 1.01, 0.99][: len(ours)])
    assert claim(verdict(rows), "equal or better quality").verdict == expected


def test_fewer_parameters_needs_a_smaller_trial() -> None:
    lora = seeds("lora", [1.0, 1.01, 0.99])
    equal = verdict(lora + seeds("kpsvd", [0.5, 0.51, 0.49]))
    assert claim(equal, "fewer parameters").verdict == "undecided"
    smaller = verdict(lora + seeds("kpsvd", [0.5, 0.51, 0.49], budget=70))
    assert smaller.claims == ()  # no budget in common


@pytest.mark.parametrize(
    ("small_lora", "expected", "figure"),
    [
        ([1.2, 1.21, 1.19], "held", "70% of the parameters"),
        ([1.0, 1.01, 0.99], "undecided", "the rank does not bind"),
        # A large gain is in the interval too.
        ([1.0, 1.4, 1.0], "undecided", "lora with 70 is not shown to be worse, so that whether"),
        (None, "undecided", "no baseline was run with that few"),
    ],
)
def test_fewer_parameters_means_nothing_where_any_method_can_be_cut(
    small_lora: list[float] | None, expected: str, figure: str
) -> None:
    rows = seeds("lora", [1.0, 1.01, 0.99]) + seeds("kpsvd", [0.9, 0.9, 0.9])
    rows += seeds("kpsvd", [0.9, 0.91, 0.89], budget=70)
    rows += seeds("lora", small_lora or [], budget=70)
    found = claim(verdict(rows), "fewer parameters")
    assert found.verdict == expected
    assert figure in found.figure


def test_more_parameters_are_no_equal_parameters() -> None:
    rows = seeds("kpsvd", [0.5, 0.51, 0.49]) + seeds(
        "lora", [1.0, 1.01, 0.99], trainable_parameters=80
    )
    found = verdict(rows)
    assert claim(found, "equal or better quality").verdict == "undecided"
    assert any("unequal numbers of parameters at 100" in note for note in found.notes)


def test_claims_wait_for_the_last_trial() -> None:
    rows = seeds("kpsvd", [0.5, 0.51, 0.49]) + seeds("lora", [1.0, 1.01, 0.99])
    found = verdict(rows, num_missing=2)
    assert found.claims == ()
    assert any("2 trials still to come" in note for note in found.notes)


def test_unequal_numbers_of_trials_and_shared_machines_are_told() -> None:
    rows = seeds("kpsvd", [0.5, 0.51]) + [row("lora", loss=1.0)]
    notes = verdict(rows, jobs=2).notes
    assert any("unequal numbers of trials at 100: kpsvd 2, lora 1" in note for note in notes)
    assert any("2 trials ran at a time" in note for note in notes)


def test_what_looked_wrong_in_trials_is_told_in_words_where_it_matters() -> None:
    clipped = {"clipping": "The gradient was clipped in 98 % of the last 50 steps."}
    rows = [row(rate=1e-3, seed=seed, loss=1.0, warnings=clipped) for seed in range(3)]
    rows[2] = row(rate=1e-3, seed=2, loss=1.0)
    rows += [row(rate=1e-1, loss=3.0, warnings={"divergence": "The validation loss rose."})]
    rows += [row(rate=1e-2, loss=2.0)]
    notes = verdict(rows).notes
    assert (
        "lora at 100, rate 0.001: clipping in 2 of 3 seeds: The gradient was clipped in 98 % of "
        "the last 50 steps." in notes
    )
    assert "divergence in 1 of 2 trials at rates not taken: lora at 0.1" in notes
    assert not any(
        "clipping" in note or "rates not taken" in note for note in verdict([row()]).notes
    )


def test_a_failed_rate_with_more_seeds_does_not_hide_a_sound_one() -> None:
    rows = [row(rate=1e-3, loss=1.0)]
    rows += [row(rate=2e-3, seed=0, loss=None), row(rate=2e-3, seed=1, loss=0.5)]
    (summary,) = verdict(rows).summaries
    assert summary.learning_rate == 1e-3


def test_a_variant_of_lora_is_the_reference_where_there_is_no_other() -> None:
    rows = seeds("kpsvd", [0.5]) + seeds("pissa", [0.6]) + seeds("lora:alpha=1r", [1.0])
    assert verdict(rows).reference == "lora:alpha=1r"
    assert verdict(seeds("kpsvd", [0.5]) + seeds("pissa", [0.6])).reference == "pissa"


def test_the_reference_reaches_its_own_loss() -> None:
    curves = [((0, 2.0), (10, 1.0 + 0.1 * seed)) for seed in range(2)]
    rows = [
        row("lora", seed=seed, loss=curve[-1][1], validation_losses=curve)
        for seed, curve in enumerate(curves)
    ]
    (summary,) = verdict(rows).summaries
    assert summary.steps_to_reference is not None
    # The mean ends at 1.05: seed 0 gets there, seed 1 does not.
    assert summary.steps_to_reference.n == 1
    assert summary.steps_to_reference.mean == pytest.approx(9.5)


def test_faster_counts_steps_to_the_baselines_loss() -> None:
    fast = ((0, 2.0), (5, 1.0), (10, 0.9))
    rows = seeds("kpsvd", [0.9] * 3, validation_losses=fast, **LONG)
    rows += seeds("lora", [1.0] * 3, **LONG)
    found = claim(verdict(rows), "faster")
    assert found.verdict == "held"
    assert "-5.0 steps" in found.figure


def test_equal_runs_are_neither_faster_nor_steadier() -> None:
    rows = seeds("kpsvd", [1.0] * 3) + seeds("lora", [1.0] * 3)
    for word in ("faster", "steadier"):
        assert claim(verdict(rows), word).verdict != "held"


def test_a_run_that_never_gets_there_is_not_faster() -> None:
    rows = seeds("kpsvd", [1.3] * 3) + seeds("lora", [1.0] * 3)
    found = claim(verdict(rows), "faster")
    assert found.verdict != "held"
    assert "3 of 3 KPSVD runs never reach it" in found.figure


def test_one_step_after_warm_up_shows_no_steadiness() -> None:
    rows = seeds("kpsvd", [1.0] * 3) + seeds("lora", [1.0] * 3)
    assert claim(verdict(rows, num_warmup=3), "steadier").figure == "too few steps after warm-up"


def test_steadier_compares_the_variation_after_warm_up() -> None:
    lora = seeds("lora", [1.0] * 3, **LONG)
    steady = seeds("kpsvd", [1.0] * 3, **(LONG | {"grad_norms": (9.0, *[1.0] * 19)}))
    assert claim(verdict(steady + lora), "steadier").verdict == "held"
    wild = seeds("kpsvd", [1.0] * 3, **(LONG | {"grad_norms": (1.0, 1.0, 90.0, *[1.0] * 17)}))
    assert claim(verdict(wild + lora), "steadier").verdict == "not held"


@pytest.mark.parametrize("num_warmup", [0, 1, 5])
def test_short_runs_decide_nothing_about_convergence_and_gradients(num_warmup: int) -> None:
    steps = 24 if num_warmup == 5 else 19
    fast = ((0, 2.0), (5, 1.0), (10, 0.9))
    changes: dict[str, Any] = {"losses": (1.0,) * steps}
    rows = seeds(
        "kpsvd", [0.9] * 3, validation_losses=fast, grad_norms=(1.0,) * steps, **changes
    ) + seeds("lora", [1.0] * 3, grad_norms=(1.0, 2.0) * 12, **changes)
    for word in ("faster", "steadier"):
        found = claim(verdict(rows, num_warmup=num_warmup), word)
        assert found.verdict == "undecided"
        assert f"runs of {steps} steps, {num_warmup} of them warm-up, are too" in found.figure


@pytest.mark.parametrize(("size", "is_equal"), [(102, True), (103, False), (98, False)])
def test_unequal_sizes_decide_nothing(size: int, is_equal: bool) -> None:
    fast = ((0, 2.0), (5, 1.0), (10, 0.9))
    steady = LONG | {"grad_norms": (9.0, *[1.0] * 19)}
    rows = seeds(
        "kpsvd", [0.9] * 3, validation_losses=fast, trainable_parameters=size, **steady
    ) + seeds("lora", [1.0] * 3, **LONG)
    for word in ("equal or better quality", "faster", "steadier"):
        found = claim(verdict(rows), word)
        assert found.verdict == ("held" if is_equal else "undecided")
        told = f"sizes differ by more than 2%: it trains {size} parameters where the other trains"
        assert (told in found.figure) is not is_equal


def test_one_seed_decides_nothing() -> None:
    rows = seeds("kpsvd", [0.5], validation_losses=((0, 2.0), (1, 0.5)), **LONG)
    rows += seeds("lora", [1.0], **LONG)
    claims = verdict(rows).claims
    assert {each.verdict for each in claims} == {"undecided"}
    # One seed says why, whatever the figures are.
    assert all(each.undecidable for each in claims), claims
    assert claims[1].undecidable == ("one seed, which cannot tell a difference from chance",)


def test_seeds_that_could_decide_say_so_where_the_interval_holds_zero() -> None:
    rows = seeds("kpsvd", [0.9, 1.1, 1.0], **LONG) + seeds("lora", [1.0, 0.9, 1.1], **LONG)
    quality = claim(verdict(rows), "equal or better quality")
    assert (quality.verdict, quality.undecidable) == ("undecided", ())


def test_a_baseline_that_learnt_nothing_cannot_be_equalled() -> None:
    rows = seeds("kpsvd", [1.99, 1.991, 1.989]) + seeds("lora", [1.999, 1.9985, 1.9995])
    found = verdict(rows)
    quality = claim(found, "equal or better quality")
    assert quality.verdict == "undecided"
    assert "lora has learnt nothing (validation loss 1.9990, the base model's is 2.0000)" in (
        quality.figure
    )
    worse = verdict(seeds("kpsvd", [1.0, 1.1]) + seeds("lora", [2.5, 2.6]))
    told = [note for note in worse.notes if "worse than the base model" in note]
    assert len(told) == 1
    assert "lora at 100 is worse than the base model at its best learning rate, 0.001" in told[0]


def test_a_rank_that_does_not_bind_is_told() -> None:
    flat = seeds("lora", [1.0, 1.1, 1.2]) + seeds("lora", [1.001, 1.1, 1.2], budget=400)
    assert any("the rank does not bind" in note for note in verdict(flat).notes)
    steep = seeds("lora", [2.0, 2.01]) + seeds("lora", [1.0, 1.01], budget=400)
    assert not any("does not bind" in note for note in verdict(steep).notes)


def test_the_verdict_survives_json() -> None:
    found = verdict(seeds("kpsvd", [1.0, 1.1]) + seeds("lora", [1.0, 1.1]))
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["summaries"][0]["method"] == "kpsvd"
    assert {each["verdict"] for each in content["claims"]} <= {"held", "not held", "undecided"}


def test_rows_survive_json() -> None:
    line = row(failed="why")
    assert TrialRow.from_dict(json.loads(json.dumps(line.to_dict()))) == line


def test_a_row_of_another_version_is_refused() -> None:
    content = row().to_dict()
    del content["rank"]
    with pytest.raises(InputError, match="rank: field required, .*expected rows of this version"):
        TrialRow.from_dict(content | {})


def test_nothing_to_compare() -> None:
    with pytest.raises(InputError, match="no trial has ended with a loss yet"):
        verdict([row(loss=None)])


def test_a_row_of_an_earlier_version_is_read() -> None:
    line = row()
    assert TrialRow.from_dict({**line.to_dict(), "cpu_seconds_per_step": 2.5}) == line
    with pytest.raises(InputError, match="cpu_seconds: unexpected keyword argument"):
        TrialRow.from_dict({**line.to_dict(), "cpu_seconds": 2.5})


def test_a_baseline_that_never_reaches_its_own_mean_proves_nothing_against_us() -> None:
    curve = ((0, 2.0), (18, 1.2), (19, 1.0), (20, 1.0))
    ours = [row("kpsvd", seed=seed, validation_losses=curve, **LONG) for seed in range(5)]
    lora = [
        row("lora", seed=seed, validation_losses=((0, 2.0), (10, low), (20, low)), **LONG)
        for seed, low in enumerate([1.0, 1.0, 1.0, 1.0, 1.6])
    ]
    found = claim(verdict(ours + lora), "faster convergence")
    # The interval of the differences lies above zero, by a run that counts all its steps.
    assert "95 % interval +1" in found.figure
    assert "1 of 5 of the baseline's never reach it" in found.figure
    assert found.verdict == "undecided"


def test_budgets_that_end_in_one_size_say_nothing_of_parameters() -> None:
    rows = [
        each
        for budget in (100, 1000)
        for each in seeds("lora", [1.0, 1.01, 0.99], budget=budget, trainable_parameters=80)
    ]
    assert not [note for note in verdict(rows).notes if "gains" in note]


def test_early_stopping_ends_trials_and_leaves_their_warm_up_as_long_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def judge(_: Any, **settings: Any) -> Any:
        given.update(settings)
        return SimpleNamespace(to_dict=dict)

    monkeypatch.setattr("kpsvd_tune.comparison.compare.compare_rows", judge)
    monkeypatch.setattr("kpsvd_tune.comparison.compare.write_page", lambda *_: None)
    values = {"train": {"warmup_ratio": 0.1}, "output_dir": str(tmp_path)}
    recipe = Recipe.model_validate({"model": {"path": "-"}, "dataset": {"path": "-"}, **values})
    session: Any = SimpleNamespace(
        recipe=recipe,
        folder=tmp_path,
        rows=[row()],
        jobs=1,
        notes=(),
        plan=None,
        base=BASE,
        purse=None,
        base_score=None,
        num_steps=100,
        grid=SimpleNamespace(holds=lambda _: True),
        trials_to_come=lambda: (0, ""),
        account=SimpleNamespace(device_seconds=1.0),
        events=SimpleNamespace(note=lambda _: None),
    )
    _conclude(session)
    # Four steps were done of a hundred, of which ten are warm-up.
    assert (given["steps"], given["num_warmup"]) == (4, 10)


def test_a_gain_that_may_be_large_does_not_show_that_the_rank_does_not_bind() -> None:
    rows = seeds("lora", [1.0, 1.01, 0.99]) + seeds("lora", [1.0, 1.4, 1.0], budget=50)
    notes = verdict(rows).notes
    assert not any("does not bind" in note for note in notes)
    assert any("whether the rank binds is open: lora gains 0.1333 nats" in note for note in notes)
