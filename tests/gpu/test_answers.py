"""An adapter beside its base answers as the model does into which it is merged."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model
from random_adapter import add_offsets
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kpsvd_tune.adapter import KpsvdConfig
from kpsvd_tune.evaluation.generation import GenerationOptions, Prompt, generate_completions

QUESTIONS = ["How many nuts has Tom?", "A lamp and a bridge.", "7"]


@pytest.mark.parametrize("shape", ["balanced", "thin"])
def test_an_unmerged_adapter_answers_as_the_merged_model(
    device: str, shape: str, tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [
        Prompt(number, text, tuple(tokenizer(text)["input_ids"]))
        for number, text in enumerate(QUESTIONS)
    ]

    def answers(model: Any) -> dict[Any, str]:
        found = generate_completions(
            model, tokenizer, prompts, GenerationOptions(max_new_tokens=24, batch_size=2)
        )
        return {each.id: each.completion for each in found}

    plain: Any = tiny_model
    base = answers(plain.to(device))
    config = KpsvdConfig(target_modules="all-linear", rank=2, factor_shape=shape)
    model: Any = get_peft_model(plain.cpu(), config)
    add_offsets(model, scale=0.1)
    unmerged = answers(model.to(device))
    assert unmerged != base
    assert answers(model.merge_and_unload()) == unmerged
