"""Every way in which PEFT loads or changes an adapter works, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter.peft_models import IDS, adapt, config, logits, perturb
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.errors import AdapterError

# PEFT warns of much that is meant here, such as a second adapter.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
Make = Callable[..., Any]


@pytest.mark.slow
def test_low_memory_loading_of_two_adapters_leaves_nothing_on_meta(
    model_factory: Make, tmp_path: Path
) -> None:
    model = adapt(model_factory())
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_factory(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert {t.device.type for t in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))
    plain = model_factory()
    inject_adapter_in_model(config(), plain, low_cpu_mem_usage=True)
    assert {p.device.type for n, p in plain.named_parameters() if "kpsvd" in n} == {"meta"}
    # Nothing is taken for what a file fills, and what is filled is where the base is.
    plain = model_factory()
    saved: Any = KpsvdConfig.from_pretrained(str(tmp_path))
    inject_adapter_in_model(saved, plain, low_cpu_mem_usage=True)
    held = {n: t for n, t in [*plain.named_parameters(), *plain.named_buffers()] if "kpsvd" in n}
    assert {t.device.type for t in held.values()} == {"meta"}
    weights = load_file(tmp_path / "adapter_model.safetensors")
    set_peft_model_state_dict(plain, weights, low_cpu_mem_usage=True)
    assert {t.device.type for t in [*plain.parameters(), *plain.buffers()]} == {"cpu"}
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.slow
def test_transformers_own_adapter_methods(model_factory: Make, tmp_path: Path) -> None:
    model = model_factory()
    model.add_adapter(config())
    perturb(model)
    expected, base = logits(model), logits(model_factory())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = model_factory()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(str(tmp_path), adapter_name="second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), base)
    loaded.enable_adapters()
    loaded.delete_adapter("second")
    loaded.set_adapter("default")
    assert loaded.active_adapters() == ["default"]
    assert torch.equal(logits(loaded), expected)
    state = get_peft_model_state_dict(adapt(model_factory()))
    assert len(loaded.get_adapter_state_dict("default")) == len(state)


def test_from_pretrained_of_an_adapter_folder(
    model_factory: Make, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = adapt(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("way", ["peft", "low memory", "second adapter", "transformers"])
def test_another_base_is_refused_whoever_loads(
    model_factory: Make, tmp_path: Path, way: str
) -> None:
    adapt(model_factory()).save_pretrained(tmp_path)
    other = model_factory(seed=4)

    def load() -> None:
        if way == "transformers":
            other.load_adapter(str(tmp_path))
        elif way == "second adapter":
            adapt(other, target_modules=["q_proj"]).load_adapter(tmp_path, "second")
        else:
            low = way == "low memory"
            PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=low)

    with pytest.raises(AdapterError, match="trained on another base model: .*q_proj is 1"):
        load()


def test_transformers_trainable_loading_checks_when_training_begins(
    model_factory: Make, tmp_path: Path
) -> None:
    adapt(model_factory()).save_pretrained(tmp_path)
    other = model_factory(seed=4)
    other.load_adapter(str(tmp_path), is_trainable=True)
    with pytest.raises(AdapterError, match="trained on another base model"):
        other.train()


@pytest.mark.parametrize(
    ("shape", "rank", "tolerance"),
    # thin factors of rank 2 make 2 * 2 * n * p = 16 columns; below that something is lost.
    [("thin", 16, 1e-6), ("balanced", 32, 1e-6), ("balanced", 0.999, 5e-3)],
)
def test_conversion_to_lora(
    model_factory: Make, tmp_path: Path, shape: str, rank: float, tolerance: float
) -> None:
    model = adapt(model_factory(), factor_shape=shape, target_modules=["q_proj", "down_proj"])
    perturb(model)
    save_as_lora(tmp_path, model, rank=rank)
    lora = PeftModel.from_pretrained(model_factory(), tmp_path)
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(lora), logits(model), rtol=0, atol=tolerance)


def test_conversion_above_the_smallest_side_is_refused(model_factory: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 32 is larger than the weight shape"):
        save_as_lora(tmp_path, adapt(model_factory(), target_modules=["k_proj"]), rank=32)


def test_hotswapping_is_refused(model_factory: Make, tmp_path: Path) -> None:
    model = adapt(model_factory())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but KPSVD was passed"):
        hotswap_adapter(model, str(tmp_path), "default")


def test_mixing_with_other_methods_is_refused(model_factory: Make) -> None:
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="'KPSVD' is not compatible with the `PeftMixedModel`"):
        get_peft_model(model_factory(), config(), mixed=True)
    mixed: Any = get_peft_model(model_factory(), lora, mixed=True)
    with pytest.raises(ValueError, match="'KPSVD' is not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("kpsvd", config())
    model = adapt(model_factory())
    with pytest.raises(ValueError, match="different peft types. Found PeftType.KPSVD and PeftT"):
        model.add_adapter("lora", lora)
    # What does work: one after the other, the first merged.
    merged = get_peft_model(model_factory(), lora).merge_and_unload()
    perturb(adapt(merged))


@pytest.mark.parametrize("name", ["test-adapter", "ä ö", "kpsvd_left", "model", "base_layer"])
def test_odd_adapter_names_survive(model_factory: Make, tmp_path: Path, name: str) -> None:
    model = adapt(model_factory(), name)
    assert any(name in each for each, _ in model.named_parameters())
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_factory(), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["", "version.2"])
def test_impossible_adapter_names_are_refused(model_factory: Make, name: str) -> None:
    with pytest.raises(AdapterError, match=f"adapter name '{name}': expected one that is not em"):
        adapt(model_factory(), name)


def test_the_name_makes_no_difference_to_the_factors(model_factory: Make) -> None:
    factors = []
    for name in ("one", "other"):
        layers = kpsvd_layers(adapt(model_factory(), name), name)
        factors.append([layer.kpsvd_left0[name] for _, layer in layers])
    assert all(torch.equal(*pair) for pair in zip(*factors, strict=True))


def test_ranks_by_layer_survive(model_factory: Make, tmp_path: Path) -> None:
    model = adapt(model_factory(), rank_pattern={"q_proj": 3, r".*0\.mlp\.up_proj": 4})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_factory(), tmp_path)
    ranks = {name: len(layer.kpsvd_left["default"]) for name, layer in kpsvd_layers(loaded)}
    assert ranks == {n: len(layer.kpsvd_left["default"]) for n, layer in kpsvd_layers(model)}
    assert set(ranks.values()) == {2, 3, 4}
    saved: Any = loaded.peft_config["default"]
    assert saved.rank_pattern == {"q_proj": 3, r".*0\.mlp\.up_proj": 4}


def test_a_classifier_trains_its_head_beside_the_adapter(
    model_factory: Make, tmp_path: Path
) -> None:
    settings = model_factory().config
    settings.num_labels = 3

    def make() -> Any:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(settings).eval()

    model = adapt(make(), task_type="SEQ_CLS")
    perturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


def test_a_layer_that_is_read_and_never_called_is_refused() -> None:
    with pytest.raises(AdapterError, match="out_proj: nn.MultiheadAttention reads its weight"):
        get_peft_model(Attention(), KpsvdConfig(target_modules=["out_proj"], rank=1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_by_pefts_way(model_factory: Make, reentrant: bool) -> None:
    model = adapt(model_factory())
    perturb(model)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in plain)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[name])
