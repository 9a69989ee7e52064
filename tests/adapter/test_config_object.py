"""The configuration object: PEFT writes into it, and it may be given to several models."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter.peft_models import IDS, adapt, logits, perturb
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForTokenClassification,
)

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.errors import AdapterError

Make = Callable[..., Any]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def fingerprints(model: Any, name: str = "default") -> list[float]:
    return [layer["fingerprint"] for layer in model.peft_config[name].layers.values()]


def test_the_object_given_is_the_one_that_peft_holds(model_factory: Make) -> None:
    config = KpsvdConfig(target_modules="all-linear", rank=2, rank_pattern={"q_proj": 0})
    model: Any = get_peft_model(model_factory(), config)
    assert model.peft_config["default"] is config
    assert config.rank_pattern == {"q_proj": 0}


@pytest.mark.parametrize(
    ("kind", "settings", "task", "head"),
    [
        (BertForTokenClassification, BertConfig, "TOKEN_CLS", "classifier"),
        (RobertaForTokenClassification, RobertaConfig, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, BertConfig, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_tasks_with_a_head_of_their_own(
    kind: Any, settings: Any, task: str, head: str, tmp_path: Path
) -> None:
    def make() -> Any:
        return kind(settings(**SIZES)).eval()

    config = KpsvdConfig(target_modules="all-linear", rank=2, task_type=task)
    base = make()
    state = copy.deepcopy(base.state_dict())
    model: Any = get_peft_model(base, config)
    assert head in (config.modules_to_save or ())
    wrapped = model.base_model.model.get_submodule(head)
    assert isinstance(wrapped, ModulesToSaveWrapper)
    assert not any(head in name for name, _ in kpsvd_layers(model))
    perturb(model)
    with torch.no_grad():
        expected = model(IDS)[0]
    model.save_pretrained(tmp_path)
    again = make()
    again.load_state_dict(state)
    loaded: Any = PeftModel.from_pretrained(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], expected)
    # Its lists now hold what PEFT wrote; a second model takes them as they are.
    second: Any = get_peft_model(make(), config)
    assert isinstance(second.base_model.model.get_submodule(head), ModulesToSaveWrapper)


def test_one_object_for_two_bases_decomposes_each(model_factory: Make, tmp_path: Path) -> None:
    config = KpsvdConfig(target_modules=["q_proj"], rank=1)
    bases = [model_factory(seed) for seed in (0, 1)]
    for number, base in enumerate(bases):
        base.name_or_path = f"base-{number}"
    first: Any = get_peft_model(bases[0], config)
    of_first = fingerprints(first)
    with pytest.warns(UserWarning, match="renamed from 'base-0' to 'base-1'"):
        second: Any = get_peft_model(bases[1], config)
    assert second.peft_config["default"] is config
    assert fingerprints(first) == of_first != fingerprints(second)
    assert [m.peft_config["default"].base_model_name_or_path for m in (first, second)] == [
        "base-0",
        "base-1",
    ]
    # Each is saved with its own layers and fits its own base.
    for number, model in enumerate((first, second)):
        perturb(model)
        model.save_pretrained(tmp_path / str(number), save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(model_factory(number), tmp_path / str(number))
        assert torch.equal(logits(loaded), logits(model))


def test_one_object_for_models_of_other_names() -> None:
    config = KpsvdConfig(target_modules="all-linear", rank=1)
    for name in ("up", "down"):
        base = nn.Sequential()
        base.add_module(name, nn.Linear(8, 6))
        adapted: Any = get_peft_model(base, config)
        assert [layer for layer, _ in kpsvd_layers(adapted)] == [name]
        assert set(adapted.peft_config["default"].layers) == {name}


def test_one_object_for_two_adapters_of_a_model(tiny_model: Any) -> None:
    config = KpsvdConfig(target_modules=["q_proj"], rank=1)
    model: Any = get_peft_model(tiny_model, config)
    model.add_adapter("second", config)
    assert model.peft_config["second"] is config
    assert fingerprints(model) == fingerprints(model, "second")
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_of_a_used_object_decomposes_its_own_base(
    how: Callable[[Any], Any], model_factory: Make
) -> None:
    config = KpsvdConfig(target_modules="all-linear", rank=1)
    first: Any = get_peft_model(model_factory(0), config)
    second: Any = get_peft_model(model_factory(1), how(config))
    assert fingerprints(first) != fingerprints(second)
    assert all(layer.kpsvd_left0["default"].any() for _, layer in kpsvd_layers(second))
    assert first.peft_config["default"] is config


def test_a_failed_use_leaves_the_object_to_its_model(model_factory: Make) -> None:
    config = KpsvdConfig(target_modules=["q_proj"], rank=1)
    first: Any = get_peft_model(model_factory(0), config)
    of_first = fingerprints(first)
    with pytest.raises(AdapterError, match="'q_proj' matches no module"):
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    assert first.peft_config["default"] is config
    assert fingerprints(first) == of_first


def test_no_arguments_are_needed_before_there_is_a_model(tiny_model: Any) -> None:
    config = KpsvdConfig()
    assert config.target_modules is None
    with pytest.raises(ValueError, match="KpsvdConfig needs target_modules: 'all-linear', a list"):
        get_peft_model(tiny_model, config)


def test_names_are_a_set_and_sorted_in_the_file(tmp_path: Path) -> None:
    names = ["v_proj", "q_proj", "q_proj", "k_proj"]
    config = KpsvdConfig(target_modules=names, exclude_modules=names)
    assert config.target_modules == config.exclude_modules == {"q_proj", "k_proj", "v_proj"}
    config.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["target_modules"] == saved["exclude_modules"] == ["k_proj", "q_proj", "v_proj"]
    loaded = KpsvdConfig.from_pretrained(str(tmp_path))
    assert loaded.to_dict() == config.to_dict()


def test_matching_nothing_is_a_value_error_as_in_peft(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="'nope' matches no module"):
        adapt(tiny_model, target_modules=["nope"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_away_from_the_base(
    dtype: torch.dtype, model_factory: Make, tmp_path: Path
) -> None:
    base = model_factory().to(dtype)
    before = logits(base)
    model = adapt(base, init_weights=False)
    for _, layer in kpsvd_layers(model):
        for factor in (layer.kpsvd_left["default"], layer.kpsvd_right["default"]):
            assert factor.dtype == torch.float32
            assert factor.detach().count_nonzero() == factor.numel()
    moved = logits(model)
    assert (moved - before).abs().max() > 0.01 * before.abs().max()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_factory().to(dtype), tmp_path)
    assert torch.equal(logits(loaded), moved)


def test_a_start_away_from_the_base_with_factors_of_one_entry() -> None:
    base = nn.Sequential(nn.Linear(5, 1))
    model: Any = get_peft_model(
        base, KpsvdConfig(target_modules=["0"], rank=1, factor_shape="pissa", init_weights=False)
    )
    x = torch.randn(3, 5)
    moved = model(x)
    assert moved.isfinite().all()
    with model.disable_adapter():
        assert not torch.equal(model(x), moved)


@pytest.mark.parametrize("rows", [[3, 5], {"embed_tokens": [3, 5]}])
def test_rows_of_the_embedding_are_trained_beside_the_adapter(
    rows: Any, model_factory: Make, tmp_path: Path
) -> None:
    model = adapt(model_factory(), trainable_token_indices=rows)
    model(IDS, labels=IDS).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    assert [p.shape[0] for p in trained.values()] == [2]
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_factory(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), logits(loaded), atol=1e-5)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaNs"), (3e38, "Infinite values")])
def test_a_broken_adapter_is_not_merged_in_pefts_words(
    value: float, kind: str, tiny_model: Any
) -> None:
    model = adapt(tiny_model, target_modules=["q_proj"])
    _, layer = next(kpsvd_layers(model))
    with torch.no_grad():
        layer.kpsvd_left["default"].fill_(value)
        layer.kpsvd_right["default"].fill_(value)
    with pytest.raises(ValueError, match=f"{kind} detected in the merged weights. The adapter def"):
        model.merge_and_unload(safe_merge=True)


def test_an_adapter_whose_shapes_an_earlier_version_chose_is_loaded(
    model_factory: Make, tmp_path: Path
) -> None:
    """Its layers say which shapes those are; a new adapter has to name a shape that exists."""
    model = adapt(model_factory())
    perturb(model)
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"factor_shape": "auto"}))
    loaded = PeftModel.from_pretrained(model_factory(), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model))
    config = KpsvdConfig(target_modules=["q_proj"], factor_shape="auto")
    with pytest.raises(AdapterError, match="unknown factor shape 'auto': expected one of balanced"):
        get_peft_model(model_factory(), config)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("target_modules", ["q_proj", 3], r"a string or a list of names, got \['q_proj', 3\]"),
        ("exclude_modules", 3, "a string or a list of names, got 3"),
        ("modules_to_save", "norm", "a list of names, got 'norm'"),
        ("modules_to_save", [-1], r"a list of names, got \[-1\]"),
        ("trainable_token_indices", 0.5, "a list of token ids, or a mapping"),
        ("trainable_token_indices", {"wte": [10**30]}, "a list of token ids, or a mapping"),
        ("rank_pattern", "q_proj", "a mapping of patterns to ranks"),
        ("dropout", "0.1", "a number, got '0.1'"),
        ("layers", ["q_proj"], "a mapping of names to a shape of four sizes and a rank"),
        ("layers", {"q_proj": {"shape": [4, 4, 4], "rank": 1}}, "a shape of four sizes and a rank"),
        ("layers", {"q_proj": {"shape": [4, 4, 4, 4], "rank": None}}, "four sizes and a rank"),
        ("layers", {"q_proj": {"shape": [4, 4, 4, 0], "rank": 1}}, "four sizes and a rank"),
    ],
)
def test_values_of_other_kinds_are_refused_by_key(key: str, value: Any, expected: str) -> None:
    with pytest.raises(AdapterError, match=f"^{key}: expected .*{expected}"):
        KpsvdConfig(**{"target_modules": ["q_proj"]} | {key: value})
