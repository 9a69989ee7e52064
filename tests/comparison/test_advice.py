"""The lines that a recommendation gives are those that the trial was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kpsvd_tune.comparison.advice import lines_to_use
from kpsvd_tune.comparison.baselines import Size, baseline
from kpsvd_tune.comparison.methods import read_methods
from kpsvd_tune.comparison.setup import Setup
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.comparison import Trial

PLAIN = {"model": {"path": "-"}, "dataset": {"path": "-"}, "output_dir": "-"}


def setup_of(method: str, recipe: Recipe, size: Size | None = None) -> Setup:
    (found,) = read_methods(method)
    own = None if size is None else baseline(found, size, "llama")
    trial = Trial(found.name, 100, recipe.train.learning_rate, 0)
    return Setup(trial, found, recipe, own, Path("folder"), {}, {})


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": {"method": "fixed", "min": 2, "max": 3, "budget": 1000}},
        {
            "form": "left",
            "factor_size": 64,
            "target_modules": ["q_proj", "v_proj"],
            "rank": {"method": "energy", "energy": 0.3, "max": 8},
            "rate": "relative",
        },
    ],
)
def test_a_recipe_with_these_lines_is_the_trials(adapter: dict[str, Any]) -> None:
    trained = {"learning_rate": 3e-3}
    recipe = Recipe.model_validate({**PLAIN, "adapter": adapter, "train": trained})
    lines = lines_to_use(setup_of("kpsvd", recipe))
    typed = yaml.safe_load("\n".join(lines))
    again = Recipe.model_validate({**PLAIN, **typed})
    assert again.adapter == recipe.adapter
    assert again.train == recipe.train
    # Form, shape, rank and rate are named also where they are the defaults.
    shape = "factor_size" if "factor_size" in adapter else "factor_shape"
    assert {"form", shape, "rank"} <= typed["adapter"].keys()
    assert {"method", "min", "max", "budget"} <= typed["adapter"]["rank"].keys()


def test_a_baseline_is_given_as_pefts_configuration() -> None:
    recipe = Recipe.model_validate({**PLAIN, "train": {"learning_rate": 2e-3}})
    size = Size(("model.layers.0.self_attn.q_proj",), 4, 256)
    first, second = lines_to_use(setup_of("lora", recipe, size))
    assert first == (
        "LoraConfig(task_type='CAUSAL_LM', r=4, target_modules=['q_proj'], lora_alpha=8)"
    )
    assert second == (
        "learning rate 0.002; `kpsvd-tune train` trains KPSVD alone: train it with PEFT, or take "
        "the adapter of this trial: folder/adapter"
    )
