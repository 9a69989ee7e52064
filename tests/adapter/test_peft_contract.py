"""What PEFT's own tests ask of every method, in our words.

Read for it: tests/testing_common.py and tests/test_custom_models.py of PEFT 0.21. Covered here, in
test_contract.py and test_peft_entry_points.py, of the checks that are not about one other method:

- attributes; the adapter's name in parameters; names of any kind; duplicate and unknown names
- files of save_pretrained, equal state after loading, selected adapters, a config object given
- several adapters: loading, switching, deleting (active, inactive, the last, merged), cleaning up
- merging: equal outputs, 16 bits, NaN, several adapters at once and one by one, twice, unmerging,
  saving what was merged; unloading; disabling, nested and after merging, with generation
- training: gradients and changes in adapter parameters alone; gradient checkpointing; k-bit
  preparation; requires_grad through switching, loading (is_trainable) and set_requires_grad
- modules_to_save: alone, in two adapters, conflicting; base_model state dicts; input embeddings
- in_features and out_features; copies; model and layer status; model cards; device_map

Not with KPSVD: bias, layers_to_transform (a regular expression of target_modules does it),
trainable tokens, embeddings and convolutions, weighted sums of adapters, mixed batches,
target_parameters.
Another choice: factors are float32 with autocast_adapter_dtype=False too.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter.peft_models import IDS, adapt, config, logits, perturb
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kpsvd_tune.adapter import KpsvdConfig, KpsvdLayer
from kpsvd_tune.errors import AdapterError

# PEFT warns of much that is meant here, such as a second adapter.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
Make = Callable[..., Any]


class Mlp(nn.Module):
    """A model that transformers knows nothing of, with both kinds of layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(10, 20)
        self.second = Conv1D(20, 20)
        self.third = nn.Linear(20, 6, bias=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.third(self.second(self.first(x).tanh()).tanh()))
        return result


X = torch.linspace(-1, 1, 40).reshape(4, 10)
LAYERS = ["first", "second", "third"]


def mlp(name: str = "default", **options: Any) -> Any:
    settings: dict[str, Any] = {"target_modules": LAYERS, "rank": 2} | options
    return get_peft_model(Mlp().eval(), KpsvdConfig(**settings), adapter_name=name)


def layers(model: nn.Module) -> list[KpsvdLayer]:
    return [module for module in model.modules() if isinstance(module, KpsvdLayer)]


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_files_of_a_saved_adapter(model_factory: Make, tmp_path: Path) -> None:
    model = adapt(model_factory())
    assert callable(model.push_to_hub)
    model.add_adapter("second", config(rank=1))
    (tmp_path / "README.md").write_text("my own words\n")
    model.save_pretrained(tmp_path)
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {each.name for each in tmp_path.iterdir()} == names | {"second"}
    # PEFT writes one card, beside the first adapter.
    assert {each.name for each in (tmp_path / "second").iterdir()} == names - {"README.md"}
    card = (tmp_path / "README.md").read_text()
    assert "my own words" in card
    assert "library_name: peft" in card
    loaded = PeftModel.from_pretrained(model_factory(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    state, found = model.state_dict(), loaded.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[key], found[key]) for key in state)


def test_a_config_object_may_be_given_when_loading(model_factory: Make, tmp_path: Path) -> None:
    model = adapt(model_factory())
    perturb(model)
    model.save_pretrained(tmp_path)
    given = KpsvdConfig.from_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(
        model_factory(), tmp_path, config=given, device_map={"": "cpu"}
    )
    assert loaded.peft_config["default"] is given
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_16_bit_bases(dtype: torch.dtype, autocast: bool) -> None:
    base = Mlp().to(dtype).eval()
    settings = KpsvdConfig(target_modules=LAYERS, rank=2)
    model: Any = get_peft_model(base, settings, autocast_adapter_dtype=autocast)
    assert {p.dtype for n, p in model.named_parameters() if "kpsvd" in n} == {torch.float32}
    perturb(model)
    x = X.to(dtype)
    adapted = model(x)
    assert adapted.dtype == dtype
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(x), adapted, rtol=5e-2, atol=5e-2)
        model.unmerge_adapter()
        assert torch.equal(model(x), adapted)
    torch.testing.assert_close(model.merge_and_unload()(x), adapted, rtol=5e-2, atol=5e-2)


def test_merging_twice_changes_nothing_and_says_so() -> None:
    model = mlp()
    perturb(model)
    model.merge_adapter()
    once = model(X)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(model(X), once)


def test_several_adapters_merge_together_and_one_by_one() -> None:
    model = mlp()
    perturb(model)
    first = model(X)
    model.add_adapter("second", KpsvdConfig(target_modules=["first", "third"], rank=1))
    model.set_adapter("second")
    perturb(model, seed=2)
    second = model(X)
    model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]
    both = model(X)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    together = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(together(X), both)
    for name, expected in (("default", first), ("second", second)):
        alone = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
        torch.testing.assert_close(alone(X), expected)
    for name in ("second", "default"):
        model.merge_adapter([name])
    torch.testing.assert_close(model(X), both)
    model.unmerge_adapter()
    assert torch.equal(model(X), both)


def test_what_was_merged_saves_copies_and_pickles(model_factory: Make, tmp_path: Path) -> None:
    model = adapt(model_factory())
    perturb(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    save_file(merged.state_dict(), tmp_path / "plain.safetensors")
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


def test_unloading_gives_the_base_back(model_factory: Make) -> None:
    base = model_factory()
    keys, before = list(base.state_dict()), logits(base)
    model = adapt(base)
    perturb(model)
    plain = model.unload()
    assert list(plain.state_dict()) == keys
    assert not hasattr(plain, "peft_config")
    assert torch.equal(logits(plain), before)


def test_disabling_with_generation_nesting_and_merging(model_factory: Make) -> None:
    model = adapt(model_factory())

    def scores() -> Tensor:
        options: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True}
        options |= {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2}
        result: Tensor = model.generate(IDS, **options).scores[0]
        return result

    base = scores()
    perturb(model)
    adapted = scores()
    assert not torch.allclose(adapted, base)
    with model.disable_adapter():
        assert torch.equal(scores(), base)
    assert torch.equal(scores(), adapted)
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert all(layer.disable_adapters for layer in layers(model))
    model.enable_adapter_layers()
    layers(model)[0].enable_adapters(False)
    message = "some adapter layers that are enabled and others that are disabled"
    with pytest.warns(UserWarning, match=message), model.disable_adapter():
        pass
    assert not any(layer.disable_adapters for layer in layers(model))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(scores(), base)


def test_generation_takes_positional_and_16_bit_input(model_factory: Make) -> None:
    model = adapt(model_factory().to(torch.bfloat16))
    mask = torch.ones_like(IDS)
    mask[1, 1] = 0
    assert model.generate(IDS, attention_mask=mask, max_new_tokens=2).shape == (2, 14)
    embeddings = model.get_input_embeddings()(IDS)
    assert model(inputs_embeds=embeddings).logits.shape == (2, 12, 259)


def test_three_steps_move_the_adapter_and_nothing_else() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        moved = ".kpsvd_left." in name or ".kpsvd_right." in name
        assert torch.equal(value, before[name]) != moved, name


def per_adapter(thing: object, name: str) -> Iterator[str]:
    """Public attributes, like a mapping, that know an adapter by its name."""
    for attribute in dir(thing):
        if attribute.startswith("_"):
            continue
        try:
            value: Any = getattr(thing, attribute)
        except AttributeError:
            continue
        is_mapping = callable(getattr(value, "keys", None)) and hasattr(value, "__getitem__")
        if is_mapping and name in value:
            yield attribute


@pytest.mark.parametrize("is_active", [True, False])
def test_deleting_leaves_nothing_behind(is_active: bool) -> None:
    model = mlp(modules_to_save=["head"])
    model.add_adapter("gone", KpsvdConfig(target_modules=LAYERS, rank=1, modules_to_save=["head"]))
    if is_active:
        model.set_adapter("gone")
    assert list(per_adapter(layers(model)[0], "gone"))
    model.delete_adapter("gone")
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]
    for thing in [model, *layers(model)]:
        assert list(per_adapter(thing, "gone")) == []
    assert not any("gone" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert torch.equal(model.base_model(X), Mlp()(X))


def test_a_merged_adapter_is_not_deleted() -> None:
    model = mlp()
    model.add_adapter("other", KpsvdConfig(target_modules=["first"], rank=1))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they"):
        model.delete_adapter("default")
    assert set(model.peft_config) == {"default", "other"}
    model.delete_adapter("other")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not model.peft_config


def test_a_failed_addition_changes_nothing() -> None:
    model = mlp()
    held, state = model.peft_config["default"], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", KpsvdConfig(target_modules=["first"], rank=4))
    with pytest.raises(AdapterError, match="'nope' matches no module"):
        model.add_adapter("bad", KpsvdConfig(target_modules=["nope"]))
    assert dict(model.peft_config) == {"default": held}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_adapters_on_different_layers_switch_everywhere() -> None:
    model = mlp(target_modules=["first", "second"])
    model.add_adapter("other", KpsvdConfig(target_modules=["second", "third"], rank=1))
    for name, expected in (("other", LAYERS[1:]), ("default", LAYERS[:2])):
        model.set_adapter(name)
        assert all(layer.active_adapters == [name] for layer in layers(model))
        where = {each.split(".kpsvd")[0].rpartition(".")[2] for each in trained(model)}
        assert where == set(expected)


def test_requires_grad_follows_loading_switching_and_the_user(
    model_factory: Make, tmp_path: Path
) -> None:
    def names(model: Any) -> set[str]:
        return {name.rpartition(".")[2] for name in trained(model)}

    adapt(model_factory()).save_pretrained(tmp_path)
    assert names(PeftModel.from_pretrained(model_factory(), tmp_path, is_trainable=True)) == {
        "default"
    }
    model: Any = PeftModel.from_pretrained(model_factory(), tmp_path)
    assert names(model) == set()
    model.add_adapter("new", config(rank=1))
    model.set_adapter("new")
    assert names(model) == {"new"}
    model.load_adapter(tmp_path, "loaded")
    assert names(model) == {"new"}
    model.set_requires_grad("default", True)
    assert names(model) == {"new", "default"}
    model.set_requires_grad(["new", "default"], False)
    assert names(model) == set()
    model.set_adapter("default", inference_mode=True)
    assert names(model) == set()


def test_modules_to_save_of_two_adapters() -> None:
    model = mlp(target_modules=["first"], modules_to_save=["head"])
    same = KpsvdConfig(target_modules=["first"], rank=1, modules_to_save=["head"])
    model.add_adapter("same", same)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "same"])
    other = KpsvdConfig(target_modules=["first"], rank=1, modules_to_save=["second"])
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    heads = model.base_model.model
    assert heads.head.active_adapters == ["default"]
    assert heads.second.active_adapters == ["other"]
    model.set_adapter("other")
    assert heads.head.active_adapters == []
    assert not any("head" in name for name in trained(model))


def test_state_of_the_base_goes_out_and_in(model_factory: Make) -> None:
    base = model_factory()
    original = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapt(base)
    state = get_base_model_state_dict(model)
    assert state.keys() == original.keys()
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(0.1)
    result = set_base_model_state_dict(model, original, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    found = get_base_model_state_dict(model)
    assert all(torch.equal(found[key], original[key]) for key in original)


def test_k_bit_preparation_and_input_gradients(model_factory: Make) -> None:
    base = prepare_model_for_kbit_training(model_factory())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    model = adapt(base)
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(IDS).requires_grad
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)


def test_layers_show_their_sizes_and_state() -> None:
    model = mlp()
    sizes = {
        layer.get_base_layer(): (layer.in_features, layer.out_features) for layer in layers(model)
    }
    assert sorted(sizes.values()) == [(10, 20), (20, 6), (20, 20)]
    status = model.get_layer_status()
    assert {each.module_type for each in status} == {"kpsvd.KpsvdLinear"}
    assert all(each.available_adapters == ["default"] for each in status)
    assert repr(layers(model)[0]).startswith("kpsvd.KpsvdLinear(")
    assert torch.isfinite(model(X)).all()
