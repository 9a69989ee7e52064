"""Tests with bitsandbytes, which scripts/test runs in processes of their own.

It makes every start of transformers 2 s slower, so that the other tests do without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

collect_ignore_glob: list[str] = [] if importlib.util.find_spec("bitsandbytes") else ["test_*.py"]


@pytest.fixture
def model_factory(
    model_factory: Callable[..., LlamaForCausalLM],
) -> Callable[..., LlamaForCausalLM]:
    """Makes tiny models whose rows are whole blocks of 64, which every CPU reads rightly."""
    return partial(model_factory, hidden_size=64, intermediate_size=128)


@pytest.fixture
def tiny_model(model_factory: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return model_factory()


@pytest.fixture
def tiny_model_dir(
    tiny_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
