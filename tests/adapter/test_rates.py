"""Learning rates of the factors: what they are multiplied with, and what a step then does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import base_weight, kpsvd_layers
from kpsvd_tune.adapter.rates import rate_factors


@pytest.fixture(params=["balanced", "thin", "pissa"])
def model(request: pytest.FixtureRequest, model_factory: Callable[..., Any]) -> Any:
    config = KpsvdConfig(target_modules="all-linear", factor_shape=request.param, rank=3)
    return get_peft_model(model_factory(), config)


def test_plain_rates_are_one(model: Any) -> None:
    found = rate_factors(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trained
    assert set(found.values()) == {1.0}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_relative_rate_is_the_relative_change_of_the_weight(model: Any, side: str) -> None:
    """One step of Adam moves every entry by the rate, up or down: so do we, and measure Delta."""
    rate, found = 0.01, rate_factors(model, is_relative=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"kpsvd_{side}" in name:
                parameter.copy_(rate * found[name] * torch.randn_like(parameter).sign())
    for _, layer in kpsvd_layers(model):
        change = layer.get_delta_weight("default").norm() / base_weight(layer).norm()
        # Terms of one layer are orthogonal on the side that stands still, so norms add up.
        assert float(change) == pytest.approx(rate, rel=1e-3)


def test_frozen_adapters_get_no_rate(model: Any) -> None:
    model.requires_grad_(False)
    assert rate_factors(model) == {}
