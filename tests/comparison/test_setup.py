"""PEFT's methods at a budget: what we count is what PEFT trains."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from peft import get_peft_model

from kpsvd_tune.comparison.methods import read_methods
from kpsvd_tune.comparison.setup import SLACK, baseline
from kpsvd_tune.errors import InputError

SIZES = {
    f"model.layers.{layer}.{name}": size
    for layer in range(2)
    for name, size in {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "mlp.down_proj": (32, 48),
    }.items()
}


@pytest.mark.parametrize("name", ["lora", "lora+", "rslora", "pissa", "lokr", "lokr:factor=4"])
@pytest.mark.parametrize("budget", [500, 700, 1500])
def test_the_count_is_what_peft_trains_and_fits(
    name: str, budget: int, model_factory: Callable[..., Any]
) -> None:
    (method,) = read_methods(name)
    found = baseline(method, SIZES, budget)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = get_peft_model(model_factory(), found.config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == found.trainable_parameters <= budget * (1 + SLACK)


def test_a_rank_more_would_not_fit() -> None:
    (lora,) = read_methods("lora")
    one = sum(out + into for out, into in SIZES.values())
    assert baseline(lora, SIZES, 3 * one).rank == 3
    assert baseline(lora, SIZES, 3 * one - 1).rank == 3  # within the slack
    assert baseline(lora, SIZES, int(2.9 * one)).rank == 2


def test_settings_reach_peft() -> None:
    plus, scaled, start = read_methods("lora+:alpha=3r,rslora,pissa:niter=0")
    found = baseline(plus, SIZES, 1000)
    assert found.rate_ratios == {"lora_B": 16.0}
    config: Any = found.config
    assert config.lora_alpha == 3 * found.rank
    config = baseline(scaled, SIZES, 1000).config
    assert config.use_rslora
    config = baseline(start, SIZES, 1000).config
    assert config.init_lora_weights == "pissa"


def test_a_budget_below_rank_one_names_both_numbers() -> None:
    (lora,) = read_methods("lora")
    one = sum(out + into for out, into in SIZES.values())
    message = f"a budget of 100 trainable parameters is below the {one:,} that lora needs"
    with pytest.raises(InputError, match=re.escape(message)):
        baseline(lora, SIZES, 100)
