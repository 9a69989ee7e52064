"""The forms of an adapter: what each trains, stores and gives again, on a whole model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.forms import FORMS, RIGHT0, Left
from kpsvd_tune.adapter.model import base_weight, kpsvd_layers
from kpsvd_tune.adapter.rates import rate_factors
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.linalg import KroneckerShape, kron_sum

IDS = torch.arange(24).reshape(2, 12)
WEIGHTS = "adapter_model.safetensors"
# Every form with the weight's factors, and those that a seed gives.
EACH: list[dict[str, Any]] = [
    {"form": "both"},
    {"form": "left", "factor_size": 8},
    {"form": "left", "factor_size": 8, "frozen_seed": 5},
    {"form": "right", "factor_size": [4, 8]},
    {"form": "right", "factor_shape": "thin", "frozen_seed": 5},
    {"form": "core"},
    {"form": "core", "factor_shape": "pissa", "frozen_seed": 5},
]


def adapt(model: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"target_modules": "all-linear", "rank": 2}
    return get_peft_model(model, KpsvdConfig(**(settings | {"task_type": "CAUSAL_LM"} | options)))


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: Any, steps: int = 3) -> Tensor:
    optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return logits(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("options", EACH, ids=str)
def test_a_form_starts_at_the_base_trains_and_merges(
    tiny_model: Any, options: dict[str, Any]
) -> None:
    before = logits(tiny_model)
    model = adapt(tiny_model, **options)
    assert torch.equal(logits(model), before)
    after = train(model)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained(model).values())
    assert (after - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    merged = logits(model.merge_and_unload())
    torch.testing.assert_close(merged, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("options", EACH, ids=str)
def test_an_adapter_is_given_again_bit_for_bit(
    tiny_model: Any,
    model_factory: Any,
    options: dict[str, Any],
    low_cpu_mem_usage: bool,
    tmp_path: Path,
) -> None:
    model = adapt(tiny_model, **options)
    after = train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        model_factory(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(logits(loaded), after)


@pytest.mark.parametrize("options", EACH, ids=str)
def test_a_file_holds_what_the_form_says(
    tiny_model: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapt(tiny_model, **options)
    model.save_pretrained(tmp_path)
    held = {key.rpartition(".")[2] for key in load_file(tmp_path / WEIGHTS)}
    form = FORMS[options["form"]]
    frozen = () if "frozen_seed" in options else form.frozen
    assert held == {*form.trained, *frozen, "kpsvd_base"}


@pytest.mark.parametrize("options", EACH[1:], ids=str)
def test_a_full_step_of_adam_moves_every_weight_by_the_rate(
    tiny_model: Any, options: dict[str, Any]
) -> None:
    """Delta = s sum theta_j T_j with orthonormal T_j and s = ||W||_F / sqrt(number of theta)."""
    rate = 0.01
    model = adapt(tiny_model, **options)
    assert set(rate_factors(model).values()) == {1.0}
    moved = []
    for name, layer in kpsvd_layers(model):
        with torch.no_grad():
            for tensor in layer.trained("default"):
                tensor.copy_(rate * torch.randn_like(tensor).sign())
        change = kron_sum(*layer.terms("default")).norm() / base_weight(layer, name).norm()
        moved.append(change.item() / rate)
    # Random directions are orthogonal only nearly, and in these tiny layers less so.
    assert math.fsum(moved) / len(moved) == pytest.approx(1, rel=0.1)
    if "frozen_seed" not in options:
        assert moved == pytest.approx([1.0] * len(moved), rel=1e-4)


@pytest.mark.parametrize("options", EACH[1:], ids=str)
def test_exchanged_frozen_factors_are_refused(
    tiny_model: Any, model_factory: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapt(tiny_model, **options)
    model.save_pretrained(tmp_path)
    if "frozen_seed" in options:
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        settings["frozen_seed"] += 1
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        tensors = load_file(tmp_path / WEIGHTS)
        part = FORMS[options["form"]].frozen[0]
        first, second = (
            f"base_model.model.model.layers.{layer}.mlp.up_proj.{part}" for layer in (0, 1)
        )
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterError, match="frozen factors project to .* were exchanged"):
        PeftModel.from_pretrained(model_factory(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", EACH[1:], ids=str)
def test_rounded_to_16_bits_an_adapter_still_loads(
    tiny_model: Any, model_factory: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapt(tiny_model, **options)
    after = train(model)
    model.save_pretrained(tmp_path)
    tensors = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in load_file(tmp_path / WEIGHTS).items()
    }
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    loaded = PeftModel.from_pretrained(model_factory(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), after, rtol=0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("options", EACH, ids=str)
def test_the_state_of_a_model_goes_into_another(
    tiny_model: Any, model_factory: Any, options: dict[str, Any]
) -> None:
    model = adapt(tiny_model, **options)
    after = train(model)
    other = adapt(model_factory(), **options)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(logits(other.eval()), after)


def test_a_wrong_base_is_refused(tiny_model: Any, model_factory: Any, tmp_path: Path) -> None:
    adapt(tiny_model, form="left", factor_size=8, frozen_seed=1).save_pretrained(tmp_path)
    other = model_factory()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.01)
    with pytest.raises(AdapterError, match="trained on another base model"):
        PeftModel.from_pretrained(other, tmp_path)


def test_forms_of_two_adapters_on_one_base(tiny_model: Any) -> None:
    model = adapt(tiny_model, form="left", factor_size=8)
    first = train(model)
    config = KpsvdConfig(
        target_modules="all-linear", form="core", rank=2, frozen_seed=1, task_type="CAUSAL_LM"
    )
    model.add_adapter("other", config)
    model.set_adapter("other")
    second = train(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)


def test_random_trained_values_change_the_outputs(tiny_model: Any) -> None:
    before = logits(tiny_model)
    model = adapt(tiny_model, form="left", factor_size=8, init_weights=False)
    assert (logits(model) - before).abs().max() > 1e-3


def test_zero_directions_stay_zero() -> None:
    shape = KroneckerShape(2, 2, 3, 3)
    (frozen,) = Left(shape, 1).freeze({RIGHT0: torch.zeros(1, 3, 3)}, 1.0)
    assert not frozen.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "lefts"}, "form 'lefts': expected one of both, left, right, core"),
        ({"form": "core", "factor_size": 8}, "factor_size .* form is core: set factor_shape"),
        ({"form": "left", "factor_size": 8.0}, "factor_size: got 8.0; expected two whole numbers"),
        ({"form": "left", "factor_size": [8]}, r"factor_size: got \[8\]; expected two whole"),
        ({"form": "left", "factor_size": 0}, "factor_size must be at least 1, got 0 x 0"),
        (
            {"form": "left", "factor_size": 8, "factor_shape": "thin"},
            "factor_size 8 and factor_shape 'thin': each decides .* set one of the two",
        ),
        ({"frozen_seed": 1}, "frozen_seed draws the frozen factors of the forms left, right"),
    ],
)
def test_wrong_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        KpsvdConfig(**options)


@pytest.mark.parametrize("form", ["left", "right", "core"])
def test_nothing_is_decomposed_for_factors_of_a_seed(
    tiny_model: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpsvd_tune.adapter.model.decompose_layer", None)
    model = adapt(tiny_model, form=form, frozen_seed=3)
    assert all(layer.kpsvd_form["default"].rank == 2 for _, layer in kpsvd_layers(model))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("part", [0, 1])
def test_both_frozen_factors_of_a_core_are_known_whatever_their_scale(
    tiny_model: Any, part: int, scale: float
) -> None:
    """One of the two carries ||W||, beside which the other must not go unseen."""
    with torch.no_grad():
        for name, weight in tiny_model.named_parameters():
            if name.endswith("up_proj.weight"):
                weight.mul_(scale)
    model = adapt(tiny_model, form="core")
    state = get_peft_model_state_dict(model)
    held = FORMS["core"].frozen[part]
    first, second = (f"base_model.model.model.layers.{n}.mlp.up_proj.{held}" for n in (0, 1))
    state[first], state[second] = state[second].clone(), state[first].clone()
    with pytest.raises(AdapterError, match="frozen factors project to .* were exchanged"):
        set_peft_model_state_dict(model, state)


@pytest.mark.slow
@pytest.mark.parametrize("options", EACH, ids=str)
def test_trained_values_may_be_cast_without_the_frozen(
    tiny_model: Any, options: dict[str, Any]
) -> None:
    model = adapt(tiny_model, **options)
    after = train(model)
    for parameter in trained(model).values():
        parameter.data, parameter.grad = parameter.data.bfloat16(), None
    torch.testing.assert_close(logits(model), after, rtol=0, atol=0.02)
    model(IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in trained(model).values()]
    assert all(grad is not None and grad.dtype == torch.bfloat16 for grad in grads)
    torch.testing.assert_close(logits(model.merge_and_unload()), after, rtol=0, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("options", EACH, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_torch_makes_by_default_changes_nothing(
    tiny_model: Any, model_factory: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    expected = adapt(model_factory(), **options)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        model = adapt(tiny_model, **options)
    finally:
        torch.set_default_dtype(default)
    pairs = zip(kpsvd_layers(model), kpsvd_layers(expected), strict=True)
    for (_, layer), (_, other) in pairs:
        for got, wanted in zip(layer.tensors("default"), other.tensors("default"), strict=True):
            assert got.dtype == torch.float32
            assert torch.equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("options", EACH, ids=str)
def test_transformers_loads_every_form(
    tiny_model: Any, model_factory: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapt(tiny_model, **options)
    after = train(model)
    model.save_pretrained(tmp_path)
    loaded = model_factory()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), after)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("norm", "q_proj: layers of .* lacks its norm, by which frozen_seed draws"),
        (None, "q_proj: layers of .* lacks its shape, rank and norm"),
    ],
)
def test_what_no_tensor_tells_of_drawn_factors_must_be_in_the_configuration(
    tiny_model: Any, model_factory: Any, key: str | None, message: str
) -> None:
    model = adapt(tiny_model, form="core", frozen_seed=2)
    state = {
        key.removeprefix("base_model.model."): value
        for key, value in get_peft_model_state_dict(model).items()
    }
    config = model.peft_config["default"]
    layers = {name: dict(layer) for name, layer in config.layers.items()}
    for name in [each for each in layers if each.endswith("q_proj")]:
        if key is None:
            del layers[name]
        else:
            del layers[name][key]
    again = KpsvdConfig(
        target_modules="all-linear",
        form="core",
        frozen_seed=2,
        layers=layers,
        task_type="CAUSAL_LM",
    )
    with pytest.raises(AdapterError, match=message):
        inject_adapter_in_model(again, model_factory(), state_dict=state)
