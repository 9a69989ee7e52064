"""Generation with an unmerged adapter: what is prepared once, and when it is prepared again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.adapter.forms import Both
from kpsvd_tune.adapter.model import kpsvd_layers

PROMPT = torch.arange(6).reshape(1, 6)


def adapt(model: LlamaForCausalLM, shape: str = "balanced") -> PeftModel:
    config = KpsvdConfig(target_modules="all-linear", rank=2, factor_shape=shape)
    adapted: PeftModel = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return adapted


def generate(model: Any, tokens: int = 8) -> list[int]:
    found: Tensor = model.generate(
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )
    return found[0].tolist()


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every stacking of factors adds an entry, whoever asks for it."""
    calls: list[int] = []
    terms = Both.terms

    def count(*args: Any) -> Any:
        calls.append(1)
        return terms(*args)

    monkeypatch.setattr(Both, "terms", count)
    return calls


@pytest.mark.parametrize("shape", ["balanced", "thin"])
def test_factors_are_prepared_once_a_layer_not_once_a_token(
    tiny_model: LlamaForCausalLM, stacked: list[int], shape: str
) -> None:
    model = adapt(tiny_model, shape).requires_grad_(False)
    layers = len(list(kpsvd_layers(model)))
    generate(model, tokens=12)
    # Once for the prompt and once for single tokens.
    assert len(stacked) == 2 * layers
    with torch.no_grad():
        past = model(PROMPT, use_cache=True).past_key_values
        past = model(PROMPT[:, :1], past_key_values=past).past_key_values
        stacked.clear()
        for _ in range(5):
            past = model(PROMPT[:, :1], past_key_values=past).past_key_values
    assert not stacked


def test_an_optimiser_step_is_seen(tiny_model: LlamaForCausalLM) -> None:
    model = adapt(tiny_model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        with torch.no_grad():
            model(PROMPT)
        optimizer = kind(parameters, lr=0.1)
        expected = model(PROMPT)
        expected.logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            inferred = model(PROMPT).logits
        torch.testing.assert_close(inferred, model(PROMPT).logits.detach(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(inferred, expected.logits, rtol=1e-4, atol=1e-5)


def test_a_write_past_the_version_is_seen_after_training(tiny_model: LlamaForCausalLM) -> None:
    model = adapt(tiny_model)
    with torch.no_grad():
        model(PROMPT)
    model(PROMPT).logits.sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(3)
    with torch.no_grad():
        inferred = model(PROMPT).logits
    torch.testing.assert_close(inferred, model(PROMPT).logits.detach(), rtol=1e-4, atol=1e-5)


def _add(parameter: torch.nn.Parameter) -> None:
    parameter.data.add_(0.1)


def _assign(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data + 0.1


@pytest.mark.parametrize("write", [_add, _assign])
def test_a_write_past_the_version_is_seen_without_any_training(
    tiny_model: LlamaForCausalLM, write: Callable[[torch.nn.Parameter], None]
) -> None:
    model = adapt(tiny_model)
    for _ in range(2):
        with torch.no_grad():
            before = model(PROMPT).logits
        for parameter in model.parameters():
            if parameter.requires_grad:
                write(parameter)
        with torch.no_grad():
            inferred = model(PROMPT).logits
        assert not torch.allclose(inferred, before, rtol=1e-4, atol=1e-5)
        true = model(PROMPT).logits.detach()
        torch.testing.assert_close(inferred, true, rtol=1e-4, atol=1e-5)


def test_frozen_factors_written_past_the_version_are_seen(tiny_model: LlamaForCausalLM) -> None:
    model = adapt(tiny_model)
    offsets = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    with torch.no_grad():
        first = model(PROMPT).logits
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(offsets) + 0.1, offsets
        )
        second = model(PROMPT).logits
        for parameter in offsets:
            parameter.data.sub_(0.1)
        third = model.eval()(PROMPT).logits
    assert not torch.allclose(first, second, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first, third, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["balanced", "thin"])
def test_merged_and_unmerged_models_say_the_same(tiny_model: LlamaForCausalLM, shape: str) -> None:
    plain = generate(tiny_model)
    model = adapt(tiny_model, shape)
    unmerged = generate(model)
    with torch.inference_mode():
        assert generate(model) == unmerged
    assert unmerged != plain
    assert generate(model.merge_and_unload()) == unmerged


def test_moved_cast_and_replaced_factors_are_seen(tiny_model: LlamaForCausalLM) -> None:
    model = adapt(tiny_model)
    with torch.no_grad():
        single = model(PROMPT).logits
        double = model.double()(PROMPT).logits
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)
        state = {
            # The frozen factors belong to the base, and others are refused.
            name: 2 * t if ".kpsvd_left." in name or ".kpsvd_right." in name else t
            for name, t in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        changed = model(PROMPT).logits
    assert not torch.allclose(changed, double)
    model.train()
    torch.testing.assert_close(model(PROMPT).logits.detach(), changed)


def test_switching_adapters_is_seen(tiny_model: LlamaForCausalLM) -> None:
    model = adapt(tiny_model)
    model.add_adapter("other", KpsvdConfig(target_modules="all-linear", rank=1))
    with torch.no_grad():
        first = model(PROMPT).logits
        model.set_adapter("other")
        other = model(PROMPT).logits
        with model.disable_adapter():
            base = model(PROMPT).logits
        assert torch.equal(other, base)
        model.set_adapter("default")
        assert torch.equal(model(PROMPT).logits, first)
        model.merge_adapter()
        torch.testing.assert_close(model(PROMPT).logits, first, rtol=1e-4, atol=1e-5)


def test_what_inference_mode_prepared_serves_no_grad_and_training(
    tiny_model: LlamaForCausalLM,
) -> None:
    model = adapt(tiny_model)
    with torch.inference_mode():
        expected = model(PROMPT).logits.clone()
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected.clone())
    model(PROMPT).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_deleting_and_adding_an_adapter_of_the_same_name_is_seen(
    tiny_model: LlamaForCausalLM,
) -> None:
    model = adapt(tiny_model)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(PROMPT).logits
        first = model(PROMPT).logits
        model.add_adapter("other", KpsvdConfig(target_modules="all-linear", rank=1))
        model.set_adapter("other")
        model.delete_adapter("default")
        assert torch.equal(model(PROMPT).logits, base)
        model.add_adapter("default", KpsvdConfig(target_modules="all-linear", rank=2))
        model.set_adapter("default")
        assert torch.equal(model(PROMPT).logits, base)
        assert not torch.equal(first, base)


def test_a_new_base_weight_and_autocast_are_seen(tiny_model: LlamaForCausalLM) -> None:
    model = adapt(tiny_model)
    with torch.no_grad():
        before = model(PROMPT).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert model(PROMPT).logits.dtype == torch.bfloat16
        assert torch.equal(model(PROMPT).logits, before)
        for _, module in kpsvd_layers(model):
            module.set_base_weight(2 * module.get_base_weight())
        changed = model(PROMPT).logits
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(model(PROMPT).logits.detach(), changed, rtol=1e-4, atol=1e-5)


def test_a_copy_keeps_nothing_of_its_original(tiny_model: LlamaForCausalLM) -> None:
    model = adapt(tiny_model)
    with torch.no_grad():
        original = model(PROMPT).logits
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
        changed = twin(PROMPT).logits
        assert torch.equal(model(PROMPT).logits, original)
    assert not torch.allclose(changed, original)
    torch.testing.assert_close(twin(PROMPT).logits.detach(), changed, rtol=1e-4, atol=1e-5)


def test_a_base_layer_that_is_offloaded_later_is_called(tiny_model: LlamaForCausalLM) -> None:
    """Accelerate replaces a layer's forward by one that brings the weight first."""
    model = adapt(tiny_model)
    calls: list[str] = []
    with torch.no_grad():
        before = model(PROMPT).logits
        for name, module in kpsvd_layers(model):
            base: Any = module.get_base_layer()

            def forward(x: Tensor, plain: Any = base.forward, name: str = name) -> Tensor:
                calls.append(name)
                return plain(x)  # type: ignore[no-any-return]

            base.forward = forward
        torch.testing.assert_close(model(PROMPT).logits, before, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(list(kpsvd_layers(model)))
