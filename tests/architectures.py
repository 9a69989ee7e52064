"""Tiny random checkpoints of several architectures, as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=4),
    "mistral": lambda: MistralConfig(**SIZES),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=4),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=4),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=3),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_experts=3,
        num_experts_per_tok=2,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def make(architecture: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    model.eval()
    return model


def save(architecture: str, folder: Path, max_shard_size: str = "5GB") -> PreTrainedModel:
    model = make(architecture)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """The weight of a module as (out, in)."""
    module = model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()
