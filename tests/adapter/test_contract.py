"""What PEFT users rely on, checked for KPSVD in every kind of layer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from kpsvd_tune.adapter import KpsvdConfig, KpsvdLayer
from kpsvd_tune.adapter.model import kpsvd_layers
from kpsvd_tune.errors import AdapterError

IDS = torch.arange(24).reshape(2, 12)


def adapt(model: nn.Module, **options: Any) -> Any:
    settings: dict[str, Any] = {"target_modules": "all-linear", "rank": 2}
    return get_peft_model(model, KpsvdConfig(**(settings | {"task_type": "CAUSAL_LM"} | options)))


def perturb(model: nn.Module, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("shape", ["balanced", "thin", "pissa", {"n": 4, "p": 8}])
def test_output_is_identical_at_the_start(tiny_model: Any, shape: object) -> None:
    before = logits(tiny_model)
    names = ["q_proj", "o_proj"] if isinstance(shape, dict) else "all-linear"
    model = adapt(tiny_model, factor_shape=shape, target_modules=names)
    assert (logits(model) - before).abs().max() == 0.0


def test_all_linear_adapts_every_linear_but_the_head(tiny_model: Any) -> None:
    model = adapt(tiny_model)
    assert len(list(kpsvd_layers(model))) == 14
    assert not isinstance(model.base_model.model.lm_head, KpsvdLayer)


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q_proj", "v_proj"], None, 4),
        (r".*\.0\..*proj", None, 7),
        ("all-linear", ["down_proj"], 12),
        ("all-linear", r".*layers\.1.*", 7),
        (["model.layers.1.mlp.up_proj"], None, 1),
    ],
)
def test_targets(tiny_model: Any, targets: object, exclude: object, expected: int) -> None:
    model = adapt(tiny_model, target_modules=targets, exclude_modules=exclude)
    assert len(list(kpsvd_layers(model))) == expected


def test_only_offsets_have_gradients(tiny_model: Any) -> None:
    model = adapt(tiny_model)
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(re.search(r"kpsvd_(left|right)\.default$", name) for name in trained)
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.grad is not None)


def test_the_first_gradient_is_that_of_the_principal_factors(tiny_model: Any) -> None:
    """Offsets train as if A0 and B0 themselves were trained against a frozen residual."""
    from kpsvd_tune.linalg import kron_sum

    model = adapt(tiny_model, target_modules=["model.layers.0.self_attn.q_proj"])
    ((_, layer),) = kpsvd_layers(model)
    perturb(model)
    model(IDS, labels=IDS).loss.backward()
    base: Any = layer.get_base_layer()
    a = (layer.kpsvd_left0["default"] + layer.kpsvd_left["default"]).detach().requires_grad_()
    b = (layer.kpsvd_right0["default"] + layer.kpsvd_right["default"]).detach().requires_grad_()
    residual = base.weight - kron_sum(layer.kpsvd_left0["default"], layer.kpsvd_right0["default"])
    model.base_model.model.model.layers[0].self_attn.q_proj = Functional(residual, a, b)
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(layer.kpsvd_left["default"].grad, a.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.kpsvd_right["default"].grad, b.grad, rtol=1e-4, atol=1e-6)


class Functional(nn.Module):
    """The paper's layer: trained factors on a frozen residual."""

    def __init__(self, residual: Tensor, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.residual, self.a, self.b = residual, a, b

    def forward(self, x: Tensor) -> Tensor:
        from kpsvd_tune.linalg import kron_sum

        return x @ (self.residual + kron_sum(self.a, self.b)).T


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_merge_equals_forward_and_unmerge_restores_bits(make: str, tiny_model: Any) -> None:
    base = tiny_model if make == "llama" else gpt2()
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    before = logits(base)
    model = adapt(base)
    perturb(model)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    plain = model.unload()
    assert all(torch.equal(p, weights[n]) for n, p in plain.named_parameters())


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_merge_and_unload(make: str, tiny_model: Any) -> None:
    base = tiny_model if make == "llama" else gpt2()
    names = [name for name, _ in base.named_modules()]
    model = adapt(base)
    perturb(model)
    adapted = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert [name for name, _ in merged.named_modules()] == names
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)


def test_safe_merge_refuses_a_broken_adapter(tiny_model: Any) -> None:
    model = adapt(tiny_model)
    _, layer = next(kpsvd_layers(model))
    with torch.no_grad():
        layer.kpsvd_left["default"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter"):
        model.merge_adapter(safe_merge=True)


def test_bias_is_kept() -> None:
    layer = nn.Sequential(nn.Linear(12, 8, bias=True))
    x = torch.randn(3, 12)
    before = layer(x)
    model = get_peft_model(layer, KpsvdConfig(target_modules=["0"], rank=2))
    assert torch.equal(model(x), before)
    perturb(model)
    after = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), after)


@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load_never_decomposes(
    tiny_model: Any,
    model_factory: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    low_memory: bool,
) -> None:
    model = adapt(tiny_model, rank={"method": "energy", "energy": 0.6, "min": 0, "max": 4})
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("kpsvd_tune.linalg.plan.kpsvd", None)
    loaded = PeftModel.from_pretrained(model_factory(), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(loaded), expected)
    again = {n: layer.kpsvd_left["default"].shape[0] for n, layer in kpsvd_layers(loaded)}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert again == {name: entry["rank"] for name, entry in config["layers"].items()}


def test_the_file_holds_offsets_factors_and_what_the_base_is_known_by(
    tiny_model: Any, tmp_path: Path
) -> None:
    adapt(tiny_model, rank=3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {name.rpartition(".")[2] for name in tensors}
    assert kinds == {f"kpsvd_{k}" for k in ("left", "right", "left0", "right0", "base")}
    assert len(tensors) == 5 * 14
    kinds_of = {name.endswith("base"): t.dtype for name, t in tensors.items()}
    assert kinds_of == {True: torch.int32, False: torch.float32}


def test_the_wrong_base_is_refused_by_name(
    tiny_model: Any, model_factory: Callable[..., Any], tmp_path: Path
) -> None:
    adapt(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="trained on another base model: model.layers.0"):
        PeftModel.from_pretrained(model_factory(1), tmp_path)


def test_a_slightly_different_base_is_refused(
    tiny_model: Any, model_factory: Callable[..., Any], tmp_path: Path
) -> None:
    adapt(tiny_model).save_pretrained(tmp_path)
    other = model_factory()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.mlp\.up_proj is 1.02 % of the norm"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_bf16_copy_of_the_base_is_accepted(
    tiny_model: Any, model_factory: Callable[..., Any], tmp_path: Path
) -> None:
    model = adapt(tiny_model)
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    half = PeftModel.from_pretrained(model_factory().to(torch.bfloat16), tmp_path)
    difference = (logits(half).float() - expected).abs().max()
    assert difference < 0.05 * expected.abs().max()


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_bf16_base_keeps_float32_factors(
    tiny_model: Any, tmp_path: Path, low_memory: bool
) -> None:
    base = tiny_model.to(torch.bfloat16)
    before = logits(base)
    model = adapt(base)
    assert (logits(model) - before).abs().max() == 0.0
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in factors.values()} == {torch.float32}
    perturb(model)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    plain = model.unload()
    loaded = PeftModel.from_pretrained(plain, tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(loaded), expected)


def test_two_adapters_switch_add_and_delete(tiny_model: Any, tmp_path: Path) -> None:
    model = adapt(tiny_model)
    perturb(model)
    first = logits(model)
    second_config = KpsvdConfig(target_modules=["q_proj"], rank=1, factor_shape="thin")
    model.add_adapter("second", second_config)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model), base)
    perturb(model)
    second = logits(model)
    assert not torch.equal(second, base)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    model.delete_adapter("second")
    model.load_adapter(tmp_path / "second", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), second)


def test_rank_zero_leaves_a_layer_untouched(tiny_model: Any) -> None:
    model = adapt(tiny_model, rank_pattern={"q_proj": 0, "k_proj": 3})
    ranks = {n: layer.kpsvd_left["default"].shape[0] for n, layer in kpsvd_layers(model)}
    assert not any("q_proj" in name for name in ranks)
    assert {rank for name, rank in ranks.items() if "k_proj" in name} == {3}


def test_every_rank_zero_is_refused(tiny_model: Any) -> None:
    with pytest.raises(AdapterError, match="every layer got rank 0: raise rank.min"):
        adapt(tiny_model, rank=0)


def test_a_weight_of_zeros_is_named(tiny_model: Any) -> None:
    nn.init.zeros_(tiny_model.model.layers[0].mlp.up_proj.weight)
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.up_proj: the weight is zero, which"):
        model = adapt(tiny_model, target_modules=["up_proj"])
    assert [name for name, _ in kpsvd_layers(model)] == ["model.layers.1.mlp.up_proj"]


def test_the_budget_counts_trainable_parameters(tiny_model: Any) -> None:
    rule = {"method": "fixed", "window": 8, "min": 0, "max": 8, "budget": 3000}
    model = adapt(tiny_model, rank=rule)
    trainable, _ = model.get_nb_trainable_parameters()
    assert 3000 - 150 < trainable <= 3000


def test_conv1d_is_adapted() -> None:
    base = gpt2()
    before = logits(base)
    model = adapt(base)
    assert len(list(kpsvd_layers(model))) == 8
    assert (logits(model) - before).abs().max() == 0.0


def test_modules_to_save_are_trained_and_saved(
    tiny_model: Any, model_factory: Callable[..., Any], tmp_path: Path
) -> None:
    model = adapt(tiny_model, modules_to_save=["model.norm"])
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(model_factory(), tmp_path)), expected)


def test_dropout_acts_in_training_only(tiny_model: Any) -> None:
    model = adapt(tiny_model, dropout=0.5).eval()
    perturb(model)
    still = logits(model)
    assert torch.equal(logits(model), still)
    model.train()
    assert not torch.equal(logits(model), still)


@torch.no_grad()
def test_dropout_may_be_sampled_in_evaluation(tiny_model: Any) -> None:
    model = adapt(tiny_model, dropout=0.5)
    perturb(model)
    model.eval()
    model(IDS[:1, :1])
    assert torch.equal(model(IDS[:1, :1]).logits, model(IDS[:1, :1]).logits)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(IDS[:1, :1]).logits, model(IDS[:1, :1]).logits)


def test_mixed_batches_are_refused(tiny_model: Any) -> None:
    model = adapt(tiny_model)
    with pytest.raises(AdapterError, match="adapter_names .* is not supported by KPSVD"):
        model(IDS, adapter_names=["default", "default"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prok"]}, r"'q_prok' matches no module; .* did you mean q_proj\?"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens: embedding"),
        ({"factor_shape": {"n": 5, "p": 2}}, "self_attn.q_proj: n = 5 does not divide in = 32"),
        ({"factor_shape": "blanced"}, "unknown factor shape 'blanced'"),
        ({"rank": {"enregy": 0.5}}, "rank: .*enregy"),
        ({"rank": {"energy": 2}}, r"rank: the energy threshold must be in \(0, 1\]"),
        ({"rank": True}, "rank must be an integer or a mapping"),
        (
            {"rank": {"method": "fixed", "max": 8, "window": 8, "min": 2, "budget": 10}},
            "minimum ranks",
        ),
        ({"rank_pattern": {"nothing": 2}}, "rank override 'nothing' matches none of the 14 layers"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"path": "gpu"}, "path 'gpu': expected one of auto, activations, weight"),
        ({"target_modules": None}, "KpsvdConfig needs target_modules"),
    ],
)
def test_wrong_options_say_what_to_do(
    tiny_model: Any, options: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        adapt(tiny_model, **options)


def test_a_tied_weight_is_refused(tokenizer: object) -> None:
    base = gpt2()
    with pytest.raises(AdapterError, match="lm_head: tied: shares its weight with transformer.wte"):
        adapt(base, target_modules=["lm_head"])


def test_non_finite_weights_are_refused_by_name(tiny_model: Any) -> None:
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.gate_proj.weight[3, 4] = float("inf")
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.gate_proj: .* 1 non-finite entries"):
        adapt(tiny_model)


def test_an_adapter_for_other_sizes_is_refused(
    tiny_model: Any, model_factory: Callable[..., Any], tmp_path: Path
) -> None:
    adapt(tiny_model, target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for layer in config["layers"].values():
        layer["shape"] = [2, 2, 3, 3]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        AdapterError, match="is this the base model that the adapter was trained on"
    ):
        PeftModel.from_pretrained(model_factory(), tmp_path)


def test_auto_peft_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()
    model = adapt(base)
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_transformers_load_adapter(
    tiny_model: Any, model_factory: Callable[..., Any], tmp_path: Path
) -> None:
    model = adapt(tiny_model)
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain = model_factory()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), expected)


def test_the_peft_type_is_a_full_member(tiny_model: Any) -> None:
    from peft.utils.peft_types import PeftType

    from kpsvd_tune.adapter.registration import add_peft_type

    members: Any = PeftType

    assert add_peft_type() is False
    assert PeftType("KPSVD") is members.KPSVD is PeftType["KPSVD"]
    assert "KPSVD" in list(PeftType)
    assert PeftType("LORA") is PeftType.LORA
    status = adapt(tiny_model).get_model_status()
    assert status.peft_types == {"default": "KPSVD"}
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    assert get_peft_model(gpt2(), lora).peft_config["default"].peft_type is PeftType.LORA
