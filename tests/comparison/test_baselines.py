"""PEFT's methods at a budget: we count what PEFT trains, and they start at the base model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model

from kpsvd_tune.comparison.baselines import (
    SLACK,
    Baseline,
    baseline,
    best_size,
    check_training,
)
from kpsvd_tune.comparison.methods import NAMES, Method, read_methods
from kpsvd_tune.errors import InputError

SIZES = {
    f"model.layers.{layer}.{name}": size
    for layer in range(2)
    for name, size in {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "mlp.down_proj": (32, 48),
    }.items()
}
ONE_RANK = sum(out + into for out, into in SIZES.values())
BASELINES = [name for name, known in NAMES.items() if known.kind != "kpsvd"]


def method(text: str) -> Method:
    (found,) = read_methods(text)
    return found


def put_on(model: Any, found: Baseline) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        wrapped = get_peft_model(model, found.config)
    for name, parameter in wrapped.named_parameters():
        if any(part in name for part in found.frozen):
            parameter.requires_grad_(False)
    return wrapped


@pytest.mark.parametrize("budget", [500, 700, 1500, 20_000])
@pytest.mark.parametrize("name", [*BASELINES, "lokr:factor=4"])
def test_the_count_is_what_peft_trains_and_fits(
    name: str, budget: int, model_factory: Callable[..., Any]
) -> None:
    size = best_size(method(name), SIZES, budget, "llama")
    model = put_on(model_factory(), baseline(method(name), size, "llama"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == size.trainable_parameters <= budget * (1 + SLACK)


@pytest.mark.parametrize("name", BASELINES)
def test_training_begins_at_the_base_model_and_reaches_every_trained_tensor(
    name: str, model_factory: Callable[..., Any]
) -> None:
    model, tokens = model_factory(), torch.arange(12).view(2, 6)
    expected = model(input_ids=tokens).logits.detach()
    size = best_size(method(name), SIZES, 2000, "llama")
    wrapped = put_on(model, baseline(method(name), size, "llama"))
    found = wrapped(input_ids=tokens, labels=tokens)
    # PiSSA's residual is the weight less a float32 product.
    assert torch.allclose(found.logits, expected, atol=1e-4)
    found.loss.backward()
    parameters = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for _ in range(2):
        # A factor whose partner starts at zero moves from the second step on.
        optimizer.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert all(not torch.equal(before[name], parameters[name]) for name in before)


def test_a_rank_more_would_not_fit() -> None:
    lora = method("lora")
    ranks = {
        budget: best_size(lora, SIZES, budget, "llama").rank
        for budget in (3 * ONE_RANK, 3 * ONE_RANK - 1, int(2.9 * ONE_RANK))
    }
    # The second is within the slack.
    assert list(ranks.values()) == [3, 3, 2]


def test_sizes_by_hand() -> None:
    # Two layers of each kind: q 32 x 32, k 16 x 32, down 32 x 48 (out x in).
    def trained(name: str, budget: int) -> int:
        return best_size(method(name), SIZES, budget, "llama").trainable_parameters

    assert trained("lora-fa", 5 * 160) == 5 * 2 * (32 + 16 + 32)
    # A vector of the outputs, and one of the rank: 1024 at most.
    assert trained("vera", 160 + 6 * 10) == 160 + 6 * 10
    assert trained("vera", 10**9) == 160 + 6 * 1024
    # Its authors' places are k by its outputs and down by its inputs; then every module.
    assert trained("ia3", 150) == 2 * (16 + 48)
    assert trained("ia3", 10**9) == 2 * (32 + 16 + 48)
    # r = 16 takes two matrices to span 32 rows and one to span 16.
    assert trained("randlora", 448) == 2 * (2 * (16 + 32) + (16 + 16) + 2 * (16 + 32))
    assert trained("hira", 2 * ONE_RANK) == 2 * ONE_RANK


def test_ia3_goes_where_it_is_told() -> None:
    # Every module that is named, and no other place.
    size = best_size(method("ia3:on=q_proj"), {"a.q_proj": (32, 32)}, 10**9, "llama")
    assert (size.modules, size.rank, size.trainable_parameters) == (("a.q_proj",), None, 32)
    # An architecture that PEFT has no places for.
    assert best_size(method("ia3"), SIZES, 10**9, "unheard-of").trainable_parameters == 160


def test_settings_reach_peft() -> None:
    def config(name: str, seed: int = 0) -> Any:
        own = method(name)
        return baseline(own, best_size(own, SIZES, 1000, "llama"), "llama", seed=seed).config

    plus = method("lora+:alpha=3r")
    found = baseline(plus, best_size(plus, SIZES, 1000, "llama"), "llama")
    assert found.rate_ratios == {"lora_B": 16.0}
    assert found.frozen == ()
    assert config("lora+:alpha=3r").lora_alpha == 3 * config("lora").r
    assert config("rslora").use_rslora
    assert config("pissa:niter=0").init_lora_weights == "pissa"
    assert config("pissa").init_lora_weights == "pissa_niter_16"
    assert config("vera:d_initial=0.2").d_initial == 0.2
    assert config("randlora").randlora_alpha == 20 * config("randlora").r
    # What is drawn and frozen differs from seed to seed, as LoRA's start does.
    assert [config(name, 3).projection_prng_key for name in ("vera", "randlora")] == [3, 3]
    assert config("ia3").feedforward_modules == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}


def test_dropout_reaches_every_method_that_has_one() -> None:
    for name in BASELINES:
        own = method(name)
        if own.kind in ("lokr", "ia3"):
            with pytest.raises(InputError, match=f"{name}: PEFT's .* cannot drop inputs"):
                check_training(own, 0.1, 0.0)
            continue
        check_training(own, 0.1, 0.0)
        config = baseline(own, best_size(own, SIZES, 1000, "llama"), "llama", dropout=0.1).config
        assert 0.1 in [value for key, value in vars(config).items() if key.endswith("dropout")]


def test_weight_decay_would_shrink_what_ia3_scales() -> None:
    check_training(method("lora"), 0.0, 0.1)
    check_training(method("ia3"), 0.0, 0.0)
    message = "ia3: its vectors are 1 where nothing is changed, and train.weight_decay, 0.1"
    with pytest.raises(InputError, match=re.escape(message)):
        check_training(method("ia3"), 0.0, 0.1)


def test_a_budget_below_the_smallest_size_names_both_numbers() -> None:
    message = (
        f"a budget of 100 trainable parameters is below the {ONE_RANK:,} that lora needs at its "
        "smallest on these 6 modules; raise --budgets, or name fewer modules, as in "
        "lora:on=q_proj+v_proj"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        best_size(method("lora"), SIZES, 100, "llama")
