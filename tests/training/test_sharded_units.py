"""What fully_shard makes units of: no weight may belong to two of them."""

from __future__ import annotations

from typing import Any

import pytest
from model_zoo import GROUPED, ZOO
from peft import get_peft_model
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.models.offload import decoder_blocks
from kpsvd_tune.training.engines.sharded import _ends


def owners(model: nn.Module, weight: Any) -> int:
    modules = model.modules()
    return sum(each is weight for module in modules for each in module._parameters.values())


def check(model: Any) -> int:
    ends = _ends(model)
    inner = {id(each) for block in decoder_blocks(model) for each in block.modules()}
    for each in ends:
        assert owners(model, each.weight) == 1
        assert id(each) not in inner
    return len(ends)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_ends_of_an_architecture_share_no_weight(name: str) -> None:
    model = ZOO[name]().make()
    if isinstance(model, GenerationMixin):  # what `train` takes
        check(model)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")
@pytest.mark.parametrize("saved", [[], ["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_tied_weight_is_in_no_unit_of_its_own(is_tied: bool, saved: list[str]) -> None:
    base = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "tie_word_embeddings": is_tied}))
    config = KpsvdConfig(target_modules=["up_proj"], rank=1, modules_to_save=saved or None)
    model: Any = get_peft_model(base, config)
    # A module that is trained whole lies in a wrapper of PEFT's, and stays in the outer unit.
    assert check(model) == (0 if is_tied else 2 - len(saved))
