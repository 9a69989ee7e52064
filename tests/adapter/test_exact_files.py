"""An adapter's file holds exactly the tensors that its configuration names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.errors import AdapterError
from kpsvd_tune.runs.find import load_adapter

FILE = "adapter_model.safetensors"
NORM = "base_model.model.model.norm.weight"


@pytest.fixture
def folder(tiny_model: Any, tmp_path: Path) -> Path:
    place = tmp_path / "adapter"
    model = get_peft_model(
        tiny_model, KpsvdConfig(target_modules=["q_proj", "up_proj"], rank=2, task_type="CAUSAL_LM")
    )
    model.save_pretrained(str(place))
    return place


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
    edit(weights)
    save_file(weights, folder / FILE)


def change_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


def roads(folder: Path, base: Callable[[], Any]) -> list[Callable[[], Any]]:
    """Every way to put the folder on a base at which PEFT asks the method."""

    def set_state() -> Any:
        model = get_peft_model(base(), KpsvdConfig.from_pretrained(str(folder)))
        return set_peft_model_state_dict(model, load_file(folder / FILE))

    return [
        lambda: load_adapter(base(), folder)[0],
        lambda: PeftModel.from_pretrained(base(), folder),
        lambda: PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=True),
        set_state,
    ]


def refused(folder: Path, base: Callable[[], Any], words: str) -> None:
    for road in roads(folder, base):
        with pytest.raises(AdapterError, match=re.escape(words)):
            road()


@pytest.mark.parametrize(
    "name", [NORM, "base_model.model.lm_head.weight", "base_model.model.nothing", "extra"]
)
def test_tensors_beside_the_adapters_are_refused(
    folder: Path, model_factory: Callable[..., Any], name: str
) -> None:
    change(folder, lambda weights: weights.update({name: torch.zeros(32)}))
    refused(folder, model_factory, f"hold {name.removeprefix('base_model.model.')}, which the conf")


def test_factors_of_a_layer_that_the_configuration_lacks_are_refused(
    folder: Path, model_factory: Callable[..., Any]
) -> None:
    change_config(folder, lambda config: config["layers"].pop("model.layers.0.mlp.up_proj"))
    refused(folder, model_factory, "hold model.layers.0.mlp.up_proj.kpsvd_base, model")


@pytest.mark.parametrize("part", ["kpsvd_left", "kpsvd_right0"])
def test_missing_tensors_are_refused(
    folder: Path, model_factory: Callable[..., Any], part: str
) -> None:
    name = f"model.layers.1.mlp.up_proj.{part}"
    change(folder, lambda weights: weights.pop(f"base_model.model.{name}"))
    refused(folder, model_factory, f"the adapter's weights lack {name} of ")


def test_a_renamed_layer_is_refused(folder: Path, model_factory: Callable[..., Any]) -> None:
    def rename(config: dict[str, Any]) -> None:
        layers = config["layers"]
        layers["model.layers.7.mlp.up_proj"] = layers.pop("model.layers.1.mlp.up_proj")

    change_config(folder, rename)
    words = "names model.layers.7.mlp.up_proj, and the model has no such layers"
    refused(folder, model_factory, words)


def test_a_module_saved_whole_must_be_in_both(
    folder: Path, model_factory: Callable[..., Any], tmp_path: Path
) -> None:
    change_config(folder, lambda config: config.update(modules_to_save=["model.norm"]))
    with pytest.raises(AdapterError, match=r"model\.norm\.weight"):
        load_adapter(model_factory(), folder)

    whole = tmp_path / "whole"
    config = KpsvdConfig(target_modules=["q_proj"], rank=1, modules_to_save=["model.norm"])
    model = get_peft_model(model_factory(), config)
    with torch.no_grad():
        # Trained, for what equals the base's own is passed over.
        norm: Any = model.get_submodule("base_model.model.model.norm")
        norm.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(str(whole))
    for road in roads(whole, model_factory):
        road()
    change_config(whole, lambda config: config.update(modules_to_save=None))
    refused(whole, model_factory, "hold model.norm.weight, which the configuration does not name")


def test_a_refused_adapter_leaves_the_base_as_it_was(
    folder: Path, model_factory: Callable[..., Any]
) -> None:
    change(folder, lambda weights: weights.update({NORM: torch.zeros(32)}))
    base = model_factory()
    with pytest.raises(AdapterError):
        load_adapter(base, folder)
    assert torch.equal(base.model.norm.weight, model_factory().model.norm.weight)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w[f"{Q_PROJ}kpsvd_left"].view(-1)[3].fill_(float("nan")), "are not finite"),
        (lambda w: w[f"{Q_PROJ}kpsvd_right0"].view(-1)[0].fill_(float("inf")), "are not finite"),
        (
            lambda w: w.update({f"{Q_PROJ}kpsvd_left": w[f"{Q_PROJ}kpsvd_left"].int()}),
            "in torch.int32, expected floating point",
        ),
        (
            lambda w: w.update({f"{Q_PROJ}kpsvd_base": w[f"{Q_PROJ}kpsvd_base"].float()}),
            "in torch.float32, expected torch.int32",
        ),
    ],
)
def test_numbers_that_no_training_saved_are_refused(
    folder: Path, model_factory: Any, edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    change(folder, edit)
    for road in roads(folder, model_factory):
        with pytest.raises(AdapterError, match=f"layers.0.self_attn.q_proj.kpsvd_.*{message}"):
            road()


@pytest.mark.parametrize("part", ["kpsvd_left", "kpsvd_left0", "kpsvd_base"])
def test_tensors_of_other_sizes_are_refused_by_name(
    folder: Path, model_factory: Any, part: str
) -> None:
    change(folder, lambda w: w.update({f"{Q_PROJ}{part}": w[f"{Q_PROJ}{part}"].flatten()[:3]}))
    words = rf"hold model.layers.0.self_attn.q_proj.{part} of size \(3,\), expected \("
    for road in roads(folder, model_factory):
        with pytest.raises(AdapterError, match=words):
            road()


@pytest.mark.slow
def test_embeddings_that_peft_saved_with_the_adapter(
    tiny_model: Any, model_factory: Any, tmp_path: Path
) -> None:
    """Equal ones change nothing; others would replace the base's."""
    settings = KpsvdConfig(target_modules=["q_proj"], rank=2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, settings)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    name = "base_model.model.model.embed_tokens.weight"
    assert name in load_file(tmp_path / FILE)
    for road in roads(tmp_path, model_factory):
        road()
    for road in roads(tmp_path, lambda: model_factory().to(torch.bfloat16)):
        road()
    model_factory().load_adapter(str(tmp_path))
    change(tmp_path, lambda weights: weights.update({name: weights[name] + 1}))
    refused(tmp_path, model_factory, "Save with save_embedding_layers=False, or name what is")
    with pytest.raises(AdapterError, match=r"It is in model\.embed_tokens\.weight"):
        model_factory().load_adapter(str(tmp_path))
