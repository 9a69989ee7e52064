"""The base model that trials share: no trial leaves a trace in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kpsvd_tune.comparison.kept_base import KeptBase, _sums
from kpsvd_tune.models import resolve_model
from kpsvd_tune.recipe import Recipe

TOKENS = torch.arange(8).view(1, 8)


@pytest.fixture
def kept(tiny_model_dir: Path) -> KeptBase:
    model = {"path": str(tiny_model_dir), "dtype": "float32"}
    recipe = Recipe.model_validate({"model": model, "dataset": {"path": "-"}, "output_dir": "-"})
    return KeptBase(resolve_model(str(tiny_model_dir), None), recipe)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def test_modules_are_copied_and_weights_shared(kept: KeptBase) -> None:
    one, other = kept.fresh(), kept.fresh()
    assert torch.equal(logits(one), logits(other))
    for own, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert own is not theirs
        assert own.data_ptr() == theirs.data_ptr()
    assert one.config is not other.config
    assert kept.num_loads == 1


def test_a_trial_may_freeze_replace_and_give_other_values(kept: KeptBase) -> None:
    before = kept.fresh()
    names, expected = [name for name, _ in before.named_modules()], logits(before)
    used = kept.fresh()
    # PiSSA gives the base layer another weight, and PEFT replaces layers and freezes all.
    pissa = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    wrapped: Any = get_peft_model(used, pissa)
    wrapped.train()
    wrapped.config.use_cache = False
    weight = used.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(weight, before.model.layers[0].self_attn.q_proj.weight)
    after = kept.fresh()
    assert [name for name, _ in after.named_modules()] == names
    assert all(parameter.requires_grad for parameter in after.parameters())
    assert not after.training
    assert after.config.use_cache
    assert torch.equal(logits(after), expected)
    assert kept.num_loads == 1


def test_weights_that_are_tied_stay_tied(kept: KeptBase) -> None:
    kept.fresh()
    kept._model.lm_head.weight = kept._model.model.embed_tokens.weight
    kept._sums = _sums(kept._model)
    tied = kept.fresh()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.lm_head.weight is not kept._model.lm_head.weight


def test_weights_that_a_trial_wrote_over_are_loaded_anew(kept: KeptBase) -> None:
    expected = logits(kept.fresh())
    # By way of data, which no version counter sees; the smallest change there is.
    weight = kept.fresh().model.layers[1].mlp.up_proj.weight
    weight.data[3, 5] = torch.nextafter(weight.data[3, 5], torch.tensor(torch.inf))
    assert torch.equal(logits(kept.fresh()), expected)
    assert kept.num_loads == 2
