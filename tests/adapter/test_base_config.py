"""What of a base the weights alone do not tell: configuration, buffers; and factors in disorder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapter.test_sketch import FILE, ROADS, WRONG, by_state_dict, from_folder, saved
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.base import other_base_allowed
from kpsvd_tune.adapter.base_config import differences, hash_of, values_of
from kpsvd_tune.errors import AdapterError

Make = Callable[..., Any]
CHANGES = {
    "rms_norm_eps": 1e-3,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
BOOKKEEPING = {
    "dtype": "bfloat16",
    "use_cache": False,
    "pad_token_id": 7,
    "eos_token_id": [1, 2],
    "attention_dropout": 0.1,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_another_configuration_is_refused_on_every_road(
    model_factory: Make, tmp_path: Path, road: Callable[[Any, Path], None]
) -> None:
    folder = saved(model_factory(), tmp_path)
    other = model_factory()
    other.config.rms_norm_eps = 1e-3
    with pytest.raises(AdapterError, match=f"{WRONG}: the configuration of the model given dif"):
        road(other, folder)


@pytest.mark.parametrize("key", CHANGES)
def test_the_key_is_named_with_both_values(model_factory: Make, tmp_path: Path, key: str) -> None:
    base, other = model_factory(), model_factory()
    folder = saved(base, tmp_path)
    old, new = getattr(base.config, key), CHANGES[key]
    setattr(other.config, key, new)
    if isinstance(new, dict):
        key, old, new = f"{key}.rope_theta", old["rope_theta"], new["rope_theta"]
    with pytest.raises(AdapterError) as caught:
        from_folder(other, folder)
    assert f"{key} {new!r} instead of {old!r}" in str(caught.value)
    assert "pass --allow-other-base" in str(caught.value)
    another = model_factory()
    another.config = other.config
    with other_base_allowed() as told:
        from_folder(another, folder)
    assert f"{key} {new!r} instead of" in told[0]


@pytest.mark.parametrize("key", BOOKKEEPING)
def test_bookkeeping_is_no_difference(model_factory: Make, tmp_path: Path, key: str) -> None:
    folder = saved(model_factory(), tmp_path)
    other = model_factory()
    setattr(other.config, key, BOOKKEEPING[key])
    from_folder(other, folder)


@pytest.mark.parametrize(
    ("name", "options", "key", "value"),
    [
        ("Roberta", {"pad_token_id": 1}, "pad_token_id", 5),  # positions are counted from it
        ("Longformer", {"pad_token_id": 1, "attention_window": 4}, "pad_token_id", 5),
        ("Esm", {"pad_token_id": 1, "mask_token_id": 2}, "token_dropout", True),
        (
            "DebertaV2",
            {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p"]}
            | {"position_biased_input": False},
            "max_position_embeddings",
            400,
        ),
    ],
)
def test_what_sounds_like_bookkeeping_and_changes_outputs_is_compared(
    tmp_path: Path, name: str, options: dict[str, Any], key: str, value: object
) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    settings = sizes | {"num_attention_heads": 2, "max_position_embeddings": 40} | options
    kind, config = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    base = kind(config(**settings)).eval()
    other = kind(config(**settings | {key: value})).eval()
    other.load_state_dict(base.state_dict())
    ids = torch.arange(12)[None] % 7 + 1
    assert not torch.equal(base(ids)[0], other(ids)[0])
    targets = ".*(query|query_proj)"
    get_peft_model(base, KpsvdConfig(target_modules=targets, rank=1)).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=f"{key} {value} instead of {settings.get(key, False)}"):
        PeftModel.from_pretrained(other, str(tmp_path))


@pytest.mark.parametrize("key", ["output_gate_type", "output_logit_soft_cap", "output_stride"])
def test_a_key_that_begins_like_a_switch_of_outputs_is_compared(
    model_factory: Make, key: str
) -> None:
    model = model_factory()
    setattr(model.config, key, 3)
    assert values_of(model)[key] == 3
    assert "output_attentions" not in values_of(model)


def test_positions_count_where_rotations_are_scaled(model_factory: Make) -> None:
    model = model_factory()
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert values_of(model)["max_position_embeddings"] == 512


def test_numbers_of_other_precision_and_keys_of_other_versions_are_equal() -> None:
    ours = {"eps": 1e-5, "theta": 10000, "types": ["full", 1.0]}
    theirs = {"eps": 9.99999974e-06, "theta": 10000.0, "types": ["full", 1], "new": 3}
    assert differences(ours, theirs) == []
    assert hash_of(ours) == hash_of({k: v for k, v in theirs.items() if k != "new"})
    assert differences(ours, theirs | {"theta": 10**400}) == [f"theta {10**400} instead of 10000"]
    assert differences(ours, theirs | {"eps": 1e-6}) == ["eps 1e-06 instead of 1e-05"]


def test_an_adapter_of_an_older_version_loads_and_says_what_was_not_compared(
    model_factory: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(model_factory(), tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    del settings["base_config"], settings["base_tensors"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(folder / FILE)
    for name, record in weights.items():
        if name.endswith("kpsvd_base"):
            record[:, 0] &= 0xFF
    save_file(weights, folder / FILE)
    other = model_factory()
    other.config.rms_norm_eps = 1e-3
    with caplog.at_level(logging.WARNING):
        from_folder(other, folder)
    assert "stored nothing of its base's configuration" in caplog.text
    with pytest.raises(AdapterError, match=WRONG):
        from_folder(model_factory(seed=1), folder)


class Convolved(nn.Module):
    """A base of no library, whose buffers are saved with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(16)
        self.proj = nn.Linear(16, 24)
        self.register_buffer("cache", torch.rand(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.proj(self.norm(x))
        return output


def test_buffers_that_are_saved_are_part_of_the_base(tmp_path: Path) -> None:
    settings = KpsvdConfig(target_modules=["proj"], rank=1)
    get_peft_model(Convolved(), settings).save_pretrained(str(tmp_path))
    same = Convolved()
    same.get_buffer("cache").zero_()
    PeftModel.from_pretrained(same, tmp_path)
    other = Convolved()
    other.get_buffer("norm.running_var").mul_(1.5)
    with pytest.raises(AdapterError, match=r"It is in norm\.running_var\. Modules"):
        PeftModel.from_pretrained(other, tmp_path)


def test_the_tensors_that_differ_are_named(model_factory: Make, tmp_path: Path) -> None:
    folder = saved(model_factory(), tmp_path)
    other = model_factory()
    with torch.no_grad():
        other.model.norm.weight[3] *= 1.05
        other.model.layers[1].self_attn.k_proj.weight.neg_()
    with pytest.raises(AdapterError) as caught:
        from_folder(other, folder)
    assert (
        "It is in model.layers.1.self_attn.k_proj.weight, model.norm.weight. Modules that a "
        "checkpoint lacks are filled with new random numbers" in str(caught.value)
    )
    other = model_factory()
    del other.model.layers[1].self_attn.v_proj
    with pytest.raises(AdapterError, match=r"One of the two has no .*1\.self_attn\.v_proj\.weight"):
        from_folder(other, folder)


@pytest.mark.slow
def test_a_module_that_the_checkpoint_lacks_is_named_with_what_to_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        max_position_embeddings=8,
    )
    checkpoint = tmp_path / "checkpoint"
    BertModel(settings, add_pooling_layer=False).save_pretrained(checkpoint)
    adapter = KpsvdConfig(target_modules=["query"], rank=1)
    model = get_peft_model(BertModel.from_pretrained(checkpoint), adapter)
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(AdapterError) as caught:
        PeftModel.from_pretrained(BertModel.from_pretrained(checkpoint), tmp_path / "adapter")
    assert "It is in pooler.dense.weight. Modules that a checkpoint lacks" in str(caught.value)
    assert "save the base once with save_pretrained" in str(caught.value)


def swapped_layers(weights: dict[str, Tensor]) -> None:
    for side in ("left0", "right0"):
        names = [f"base_model.model.model.layers.{k}.mlp.up_proj.kpsvd_{side}" for k in (0, 1)]
        weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]


def reversed_terms(weights: dict[str, Tensor]) -> None:
    for side in ("left0", "right0"):
        name = f"base_model.model.model.layers.0.self_attn.q_proj.kpsvd_{side}"
        weights[name] = weights[name].flip(0).contiguous()


def reversed_left_terms(weights: dict[str, Tensor]) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.kpsvd_left0"
    weights[name] = weights[name].flip(0).contiguous()


def a_later_term_of_noise(weights: dict[str, Tensor]) -> None:
    left = weights["base_model.model.model.layers.1.self_attn.q_proj.kpsvd_left0"]
    left[1] = torch.randn_like(left[1])


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
@pytest.mark.parametrize("change", [swapped_layers, reversed_terms], ids=lambda each: each.__name__)
def test_exchanged_factors_are_refused_on_every_road(
    model_factory: Make, tmp_path: Path, road: Callable[[Any, Path], None], change: Any
) -> None:
    folder = saved(model_factory(), tmp_path)
    weights = load_file(folder / FILE)
    change(weights)
    save_file(weights, folder / FILE)
    with pytest.raises(AdapterError, match="frozen factors were exchanged with those of another"):
        road(model_factory(), folder)


@pytest.mark.parametrize("change", [reversed_left_terms, a_later_term_of_noise])
def test_terms_that_are_not_the_weights_are_refused(
    model_factory: Make, tmp_path: Path, change: Any
) -> None:
    folder = saved(model_factory(), tmp_path)
    weights = load_file(folder / FILE)
    change(weights)
    save_file(weights, folder / FILE)
    # The base is the right one, so that allowing another excuses nothing.
    with pytest.raises(AdapterError, match=r"q_proj: the weight projects to"), other_base_allowed():
        from_folder(model_factory(), folder)


def test_factors_that_were_never_the_weights_terms_load(
    model_factory: Make, tmp_path: Path
) -> None:
    """Adapters may start from random numbers or from a gradient."""
    from kpsvd_tune.adapter import load_factors
    from kpsvd_tune.adapter.model import kpsvd_layers

    model = get_peft_model(
        model_factory(), KpsvdConfig(target_modules=["q_proj", "up_proj"], rank=2)
    )
    load_factors(
        model,
        {
            name: (
                torch.randn_like(layer.kpsvd_left0["default"]),
                torch.randn_like(layer.kpsvd_right0["default"]),
            )
            for name, layer in kpsvd_layers(model)
        },
    )
    model.save_pretrained(str(tmp_path))
    for road in (from_folder, by_state_dict):
        road(model_factory(), tmp_path)
