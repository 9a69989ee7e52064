"""Tiny random models of many architectures, each with an input that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

IDS = torch.arange(3, 15).reshape(2, 6)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
VISION = {"image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Kind:
    """How to make a model, and what to give it.

    Args:
        model: Its class in transformers.
        config: Its configuration's class.
        options: What makes it tiny.
        inputs: What it is called with.
        idle: Ends of the names of layers that this input does not reach, or that are not called.
    """

    model: str
    config: str
    options: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=lambda: {"input_ids": IDS})
    idle: tuple[str, ...] = ()

    def make(self) -> Any:
        torch.manual_seed(0)
        settings = getattr(transformers, self.config)(**self.options)
        return getattr(transformers, self.model)(settings).eval()


def output_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The first floating-point tensor that a model returns: logits, or hidden states."""
    result = model(**inputs)
    for value in result.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise AssertionError(f"{type(model).__name__} returns no tensor")


def _causal(name: str, options: dict[str, Any], config: str = "", **more: Any) -> Kind:
    return Kind(f"{name}ForCausalLM", config or f"{name}Config", options, **more)


_TEXT_PART = {**SMALL, "projection_dim": 8, "eos_token_id": 2}
_ENCODER_DECODER = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
_PAIR = {"input_ids": IDS, "decoder_input_ids": IDS}

ZOO: dict[str, Callable[[], Kind]] = {
    "llama": lambda: _causal("Llama", GROUPED),
    "mistral": lambda: _causal("Mistral", GROUPED),
    "qwen2": lambda: _causal("Qwen2", GROUPED),
    "qwen3": lambda: _causal("Qwen3", GROUPED),
    "gemma": lambda: _causal("Gemma", GROUPED),
    "gemma2": lambda: _causal("Gemma2", GROUPED),
    "gemma3": lambda: _causal("Gemma3", GROUPED, "Gemma3TextConfig"),
    # Its block uses methods of one of its children.
    "gemma3n": lambda: _causal(
        "Gemma3n",
        {**GROUPED, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4}
        | {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "laurel_rank": 2, "head_dim": 8}
        | {"altup_num_inputs": 2, "activation_sparsity_pattern": None}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        "Gemma3nTextConfig",
    ),
    "phi": lambda: _causal("Phi", SMALL),
    "phi3": lambda: _causal("Phi3", {**GROUPED, "pad_token_id": 0}),
    "olmo2": lambda: _causal("Olmo2", GROUPED),
    "granite": lambda: _causal("Granite", GROUPED),
    "cohere": lambda: _causal("Cohere", GROUPED),
    "stablelm": lambda: _causal("StableLm", GROUPED),
    "starcoder2": lambda: _causal("Starcoder2", GROUPED),
    "nemotron": lambda: _causal("Nemotron", GROUPED),
    "smollm3": lambda: _causal("SmolLM3", {**GROUPED, "pad_token_id": 0}),
    "glm4": lambda: _causal("Glm4", {**GROUPED, "pad_token_id": 0}),
    "falcon": lambda: _causal("Falcon", {**SMALL, "new_decoder_architecture": False}),
    "falcon with parallel attention off": lambda: _causal(
        "Falcon", {**SMALL, "parallel_attn": False, "alibi": True, "bias": True}
    ),
    "gpt2": lambda: Kind(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    "gpt_neox": lambda: _causal("GPTNeoX", SMALL),
    "gptj": lambda: _causal(
        "GPTJ",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        | {"rotary_dim": 4},
    ),
    "bloom": lambda: _causal(
        "Bloom", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    ),
    "mpt": lambda: _causal(
        "Mpt", {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}
    ),
    "opt": lambda: _causal("OPT", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "mixtral": lambda: _causal("Mixtral", {**GROUPED, "num_local_experts": 3}),
    "olmoe": lambda: _causal("Olmoe", {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": lambda: _causal("Qwen3Moe", EXPERTS),
    "gpt_oss": lambda: _causal(
        "GptOss", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}
    ),
    "deepseek_v3": lambda: _causal(
        "DeepseekV3",
        {**SMALL, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
        | {"v_head_dim": 8},
    ),
    "mamba": lambda: _causal(
        "Mamba",
        {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    ),
    "falcon_mamba": lambda: _causal(
        "FalconMamba",
        {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    ),
    "mamba2": lambda: _causal(
        "Mamba2",
        {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
        | {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    ),
    "lfm2": lambda: _causal("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
    "bert": lambda: Kind("BertForSequenceClassification", "BertConfig", SMALL),
    "roberta, tokens": lambda: Kind("RobertaForTokenClassification", "RobertaConfig", SMALL),
    "electra, answers": lambda: Kind("ElectraForQuestionAnswering", "ElectraConfig", SMALL),
    "deberta": lambda: Kind("DebertaForSequenceClassification", "DebertaConfig", SMALL),
    "deberta_v2": lambda: Kind(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "distilbert": lambda: Kind(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    ),
    "modernbert": lambda: Kind(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**SMALL, **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0)}
        | dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    ),
    "xlnet": lambda: Kind(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": 64, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
    ),
    "t5": lambda: Kind(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        _PAIR,
    ),
    "bart": lambda: Kind("BartForConditionalGeneration", "BartConfig", _ENCODER_DECODER, _PAIR),
    "bart's decoder alone": lambda: Kind(
        "BartForCausalLM",
        "BartConfig",
        _ENCODER_DECODER,
        idle=tuple(f"encoder_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    ),
    "whisper": lambda: Kind(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 10}
        | {"max_target_positions": 32, "pad_token_id": 0, "decoder_start_token_id": 1},
        {"input_features": PIXELS[:, 0].reshape(2, -1)[:, :160].reshape(2, 8, 20)}
        | {"decoder_input_ids": IDS},
    ),
    "vit": lambda: Kind(
        "ViTForImageClassification", "ViTConfig", {**SMALL, **VISION}, {"pixel_values": PIXELS}
    ),
    "clip": lambda: Kind(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _TEXT_PART, "vision_config": {**SMALL, **VISION, "projection_dim": 8}}
        | {"projection_dim": 8},
        {"input_ids": IDS, "pixel_values": PIXELS},
    ),
    "llava on text": lambda: Kind(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"text_config": {"model_type": "llama", **GROUPED}, "image_token_index": 63}
        | {"vision_config": {"model_type": "clip_vision_model", **SMALL, **VISION}},
        idle=("vision_tower", "multi_modal_projector"),
    ),
}
