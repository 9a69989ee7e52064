"""At which of the budgets a baseline is run, and what a reader is told of its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.comparison.methods import read_methods
from kpsvd_tune.comparison.setup import Setups
from kpsvd_tune.errors import InputError
from kpsvd_tune.recipe import Recipe
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
