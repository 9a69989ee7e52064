"""What may happen to a model between merging an update and taking it out again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.errors import AdapterError

UNMERGING = pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)


def config() -> KpsvdConfig:
    return KpsvdConfig(target_modules="all-linear", rank=2, factor_shape="thin")


def trained(model: nn.Module) -> Any:
    adapted: Any = get_peft_model(model, config()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in kpsvd_layers(adapted):
            for offset in (layer.kpsvd_left, layer.kpsvd_right):
                offset["default"].copy_(torch.randn(offset["default"].shape, generator=generator))
    return adapted


def factors(model: Any, name: str) -> list[Tensor]:
    return [layer.kpsvd_left0[name] for _, layer in kpsvd_layers(model, name)]


@UNMERGING
def test_an_adapter_that_is_added_while_another_is_merged_is_of_the_base() -> None:
    model = trained(base())
    model.merge_adapter()
    model.add_adapter("second", config())
    expected = factors(get_peft_model(base(), config()), "default")
    assert all(map(torch.equal, factors(model, "second"), expected))


def test_adding_to_a_merged_model_says_that_it_is_unmerged() -> None:
    model = trained(base())
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", config())
    assert not any(layer.merged for _, layer in kpsvd_layers(model))


@UNMERGING
@pytest.mark.parametrize("road", ["load_adapter", "set_peft_model_state_dict"])
def test_the_right_base_is_known_while_an_adapter_is_merged(road: str, tmp_path: Path) -> None:
    model, x = trained(base()), torch.randn(3, 16)
    expected = model(x)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(get_peft_model_state_dict(model))
    model.merge_adapter()
    if road == "load_adapter":
        model.load_adapter(tmp_path, "second")
        model.set_adapter("second")
    else:
        set_peft_model_state_dict(model, state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_while_merged_unmerges_to_the_cast_base(dtype: torch.dtype) -> None:
    model = trained(base())
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    weights = [layer.get_base_weight() for _, layer in kpsvd_layers(model)]
    plain: Any = base(dtype)
    assert all(map(torch.equal, weights, (plain[0].weight, plain[2].weight)))
    assert model(torch.randn(3, 16, dtype=dtype)).dtype == dtype


def test_a_float64_base_is_merged_in_float64() -> None:
    model, x = trained(base(torch.float64)), torch.randn(3, 16, dtype=torch.float64)
    layers = [layer for _, layer in kpsvd_layers(model)]
    expected = [
        layer.get_base_weight() + layer.get_delta_weight("default").double() for layer in layers
    ]
    model(x)
    model.merge_adapter()
    assert all(map(torch.equal, [layer.get_base_weight() for layer in layers], expected))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_a_model_with_adapters_is_no_base() -> None:
    with pytest.raises(AdapterError, match=r"has adapters of PEFT already.*with add_adapter"):
        get_peft_model(trained(base()), config())
