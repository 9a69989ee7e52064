"""Bases that are compiled or offloaded are decomposed, adapted, saved and loaded as plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import (  # type: ignore[import-untyped]
    cpu_offload,
    disk_offload,
    init_empty_weights,
)
from adapter.peft_models import IDS, adapt, logits, perturb
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.errors import AdapterError

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Wrapped as by torch.compile, and run as written: names are what matters, and cost nothing."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def partly_compiled(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = compiled(layer)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [compiled, partly_compiled])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "model.layers.1.mlp.up_proj"]])
def test_compiled_bases_take_adapters(
    wrap: Callable[[Any], Any], targets: Any, model_factory: Make, tmp_path: Path
) -> None:
    plain = adapt(model_factory(), target_modules=targets)
    model = adapt(wrap(model_factory()), target_modules=targets)
    assert model.peft_config["default"].layers == plain.peft_config["default"].layers
    assert [name for name, _ in kpsvd_layers(model)] == [name for name, _ in kpsvd_layers(plain)]
    for adapted in (plain, model):
        perturb(adapted)
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # What was saved around a compiled base goes on a plain one, and the other way.
    model.save_pretrained(tmp_path / "compiled")
    plain.save_pretrained(tmp_path / "plain")
    for folder in ("compiled", "plain"):
        for base in (model_factory(), wrap(model_factory())):
            loaded = PeftModel.from_pretrained(base, tmp_path / folder)
            assert torch.allclose(logits(loaded), logits(plain), atol=1e-6)


@pytest.mark.slow
def test_another_base_is_refused_around_a_compiled_one(model_factory: Make, tmp_path: Path) -> None:
    adapt(compiled(model_factory(0))).save_pretrained(tmp_path)
    for base in (model_factory(1), compiled(model_factory(1))):
        with pytest.raises(AdapterError, match="trained on another base model: model.layers.0"):
            PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_base_runs_compiled(model_factory: Make) -> None:
    model = adapt(compiled(model_factory()), target_modules=["q_proj"])
    perturb(model)
    expected = logits(model)
    with torch.compiler.set_stance("default"):
        assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_bases_are_fetched_layer_by_layer(
    where: str, model_factory: Make, tmp_path: Path
) -> None:
    def offloaded() -> Any:
        model = model_factory()
        if where == "memory":
            return cpu_offload(model, execution_device="cpu")
        return disk_offload(model, str(tmp_path / "weights"), execution_device="cpu")

    base = offloaded()
    before = logits(base)
    plain, model = adapt(model_factory()), adapt(base)
    assert model.peft_config["default"].layers == plain.peft_config["default"].layers
    assert torch.equal(logits(model), before)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.is_meta  # let go of again
    for adapted in (plain, model):
        perturb(adapted)
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(model_factory(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(plain))
    loaded = PeftModel.from_pretrained(offloaded(), tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(plain), atol=1e-6)


def test_a_base_without_weights_is_refused_by_name(model_factory: Make) -> None:
    settings = model_factory().config
    with init_empty_weights():
        model = type(model_factory())(settings)
    assert target_names(model, "all-linear")  # names need no weights
    with pytest.raises(AdapterError, match=r"model.layers.0.self_attn.q_proj has no weight to de"):
        get_peft_model(model, KpsvdConfig(target_modules="all-linear"))


def test_a_state_dict_says_which_layers_are_injected(model_factory: Make) -> None:
    def inject(targets: list[str], state: Any) -> Any:
        config = KpsvdConfig(target_modules=targets, rank=2)
        return inject_adapter_in_model(config, model_factory(), state_dict=state)

    source = adapt(model_factory(), target_modules=["q_proj", "v_proj"])
    state = {
        k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(source).items()
    }
    with pytest.warns(RuntimeWarning, match="state_dict contained these additional target modules"):
        model = inject(["q_proj"], state)
    expected = [name for name, _ in kpsvd_layers(source)]
    assert [name for name, _ in kpsvd_layers(model)] == expected
    assert list(model.peft_config["default"].layers) == expected
    fewer = {key: value for key, value in state.items() if "v_proj" not in key}
    with pytest.warns(RuntimeWarning, match="config contained these additional target modules"):
        model = inject(["q_proj", "v_proj"], fewer)
    assert {name.rpartition(".")[2] for name, _ in kpsvd_layers(model)} == {"q_proj"}
    assert list(model.peft_config["default"].layers) == [n for n, _ in kpsvd_layers(model)]
