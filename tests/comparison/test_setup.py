"""At which of the budgets a baseline is run, and what a reader is told of its sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kpsvd_tune.comparison.methods import read_methods
from kpsvd_tune.comparison.setup import Setups, _rank_rule
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import RankRecipe, Recipe
from kpsvd_tune.report.comparison import Trial

SIZES = {f"model.layers.{layer}.self_attn.{name}": (32, 32) for layer in (0, 1) for name in "qk"}


def prepared(methods: str, budgets: list[int], **changes: Any) -> Setups:
    values = {"model": {"path": "-"}, "dataset": {"path": "-"}, "output_dir": "-", **changes}
    recipe = Recipe.model_validate(values)
    found = read_methods(methods)
    names = [method.name for method in found]
    setups = Setups(
        recipe,
        dict.fromkeys(names, recipe),
        found,
        dict.fromkeys(names, SIZES),
        "llama",
        Path("folder"),
        {},
    )
    nothing: Any = None  # no base is decomposed, and nobody told of it
    setups.prepare(nothing, budgets, nothing)
    return setups


def test_a_baseline_is_run_where_it_fits_and_once_at_each_size() -> None:
    setups = prepared("lora,ia3", [100, 256, 520])
    # A rank of LoRA is 4 x 64; IA3 has one vector a module.
    assert setups.budgets == {"lora": (256, 520), "ia3": (256,)}
    lora, *_ = setups.notes
    assert lora.startswith(
        "lora is not run at 100: a budget of 100 trainable parameters is below the 256 that lora "
        "needs at its smallest on these 4 modules"
    )


def test_what_is_fixed_is_the_nearest_below_and_said() -> None:
    setups = prepared("ia3", [100, 200, 400])
    assert setups.budgets == {"ia3": (200,)}
    assert setups.notes == [
        "ia3 at 200 trains 128 parameters, the nearest below of the sizes that it has on these "
        "modules",
        "ia3 is not run at 400: it would train the same 128 parameters as at 200",
        "ia3 is not run at 100: a budget of 100 trainable parameters is below the 128 that ia3 "
        "needs at its smallest on these 4 modules; raise --budgets, or name fewer modules, as in "
        "ia3:on=q_proj+v_proj",
    ]


def test_a_baseline_that_no_budget_is_enough_for_is_refused() -> None:
    with pytest.raises(InputError, match="a budget of 90 .* is below the 256 that lora needs"):
        prepared("lora", [80, 90])


def test_what_the_recipe_says_of_training_must_suit_the_method() -> None:
    with pytest.raises(InputError, match="would pull them to 0"):
        prepared("ia3", [200], train={"weight_decay": 0.1})


def test_a_trial_draws_by_its_seed() -> None:
    setups = prepared("vera", [200])
    setup = setups.setup(Trial("vera", 200, 1e-2, 5), {})
    assert setup.baseline is not None
    config: Any = setup.baseline.config
    assert config.projection_prng_key == 5
    assert setup.recipe.train.learning_rate == 1e-2
    assert setup.baseline.size.trainable_parameters == 4 * 32 + 4 * config.r


@pytest.mark.parametrize(
    ("name", "power", "budget", "expected"),
    [
        # 14 layers of r x r each: 4 x 4 fit into 300 parameters, and the window ends at 8.
        ("kpsvd:form=core", 2, 300, (4, 5)),
        ("lora-xs", 2, 300, (4, 4)),
        ("lora-xs", 2, 10**6, (8, 8)),
        ("kpsvd", 1, 14 * 3 + 5, (3, 4)),
        # Less than a term a layer: some layers get one.
        ("kpsvd", 1, 10, (0, 1)),
    ],
)
def test_equal_ranks_fit_whatever_a_rank_costs(
    name: str, power: int, budget: int, expected: tuple[int, int]
) -> None:
    class Costs:
        def report(self, rule: RankRecipe) -> Any:
            assert rule.min == rule.max
            return SimpleNamespace(totals={"trainable_parameters": 14 * rule.min**power})

    (method,) = read_methods(name)
    spectra: Any = Costs()
    rule = _rank_rule(method, RankRecipe(window=8, max=8), spectra, budget)
    assert (rule.min, rule.max) == expected
    assert rule.budget == budget
    assert rule.method == "fixed"


def test_a_rank_rule_of_its_own_is_kept() -> None:
    (method,) = read_methods("kpsvd:rank.max=2")
    nothing: Any = None
    rule = _rank_rule(method, RankRecipe(max=2), nothing, 70)
    assert rule == RankRecipe(max=2, budget=70)


def test_kpsvd_is_run_once_at_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(rule: RankRecipe) -> Any:
        layers = [SimpleNamespace(rank=rule.min) for _ in range(14)]
        return SimpleNamespace(layers=layers, totals={"trainable_parameters": 14 * rule.min**2})

    spectra = SimpleNamespace(report=report, factors=lambda _: {})
    monkeypatch.setattr("kpsvd_tune.comparison.setup.collect_spectra", lambda *_, **__: spectra)
    monkeypatch.setattr("kpsvd_tune.comparison.setup.report_decomposition", lambda _: None)
    values = {"model": {"path": "-"}, "dataset": {"path": "-"}, "output_dir": "-"}
    recipe = Recipe.model_validate({**values, "adapter": {"rank": {"window": 8, "max": 8}}})
    methods, nothing = read_methods("lora-xs"), SimpleNamespace(path="-")
    setups = Setups(recipe, {"lora-xs": recipe}, methods, {}, "llama", Path("folder"), {})
    events: Any = SimpleNamespace(stage=lambda _: None, end_progress=lambda: None)
    source: Any = nothing
    setups.prepare(source, [10**6, 300, 2000], events)
    # 4 x 4 in each of 14 layers; then the window of 8 is the end.
    assert setups.budgets == {"lora-xs": (300, 2000)}
    assert setups.notes == [
        "lora-xs is not run at 1,000,000: it would train the same 896 parameters as at 2,000"
    ]
