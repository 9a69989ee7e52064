"""Which architectures keep packed rows apart: the table of docs/data.md, tried."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from accelerate import Accelerator  # type: ignore[import-untyped]
from architectures import SIZES
from packaging.version import Version

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.training.loss import SummedTokenLoss
from kpsvd_tune.training.packing import attend_by_rows, prove_packing

EXPERTS: dict[str, Any] = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
# GPT-2's names.
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
SHORT: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
MAMBA: dict[str, Any] = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8}

APART: dict[str, Callable[[], Any]] = {
    "cohere": lambda: t.CohereConfig(**SIZES),
    "cohere2": lambda: t.Cohere2Config(**SIZES, sliding_window=4),
    "deepseek_v3": lambda: t.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "exaone4": lambda: t.Exaone4Config(**SIZES, sliding_window=4),
    "gemma3": lambda: t.Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=4),
    "glm4": lambda: t.Glm4Config(**SIZES, head_dim=4),
    "gpt_bigcode": lambda: t.GPTBigCodeConfig(**GPT, n_positions=32),
    "granite": lambda: t.GraniteConfig(**SIZES),
    "helium": lambda: t.HeliumConfig(**SIZES, head_dim=4),
    "llama4": lambda: t.Llama4TextConfig(
        **SIZES, head_dim=4, intermediate_size_mlp=24, num_local_experts=2, attention_chunk_size=4
    ),
    "nemotron": lambda: t.NemotronConfig(**SIZES),
    "olmo2": lambda: t.Olmo2Config(**SIZES),
    "phi": lambda: t.PhiConfig(**SIZES),
    "phi3": lambda: t.Phi3Config(**SIZES),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "smollm3": lambda: t.SmolLM3Config(**SIZES),
    "stablelm": lambda: t.StableLmConfig(**SIZES),
    "starcoder2": lambda: t.Starcoder2Config(**SIZES),
}
APART_WITH_EAGER: dict[str, Callable[[], Any]] = {
    "codegen": lambda: t.CodeGenConfig(**GPT, n_positions=32, rotary_dim=4),
    "gptj": lambda: t.GPTJConfig(**GPT, n_positions=32, rotary_dim=4),
    "gpt_neo": lambda: t.GPTNeoConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
        window_size=4,
    ),
}
LEAKING: dict[str, Callable[[], Any]] = {
    # They take positions and make their masks without them (transformers 5.23).
    "biogpt": lambda: t.BioGptConfig(
        **SHORT, intermediate_size=24, num_attention_heads=4, max_position_embeddings=32
    ),
    "falcon": lambda: t.FalconConfig(**SHORT, num_attention_heads=4, alibi=False),
    "gpt_oss": lambda: t.GptOssConfig(
        **SIZES, head_dim=4, num_local_experts=3, num_experts_per_tok=2, sliding_window=4
    ),
    "opt": lambda: t.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16),
    "xglm": lambda: t.XGLMConfig(
        vocab_size=64,
        d_model=16,
        ffn_dim=24,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=32,
    ),
    # They take none.
    "bloom": lambda: t.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4),
    "mpt": lambda: t.MptConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=4, max_seq_len=64),
    # A state or a convolution runs on from row to row.
    "bamba": lambda: t.BambaConfig(**SIZES, **MAMBA, attn_layer_indices=[1]),
    "falcon_h1": lambda: t.FalconH1Config(**SIZES, **MAMBA, mamba_d_ssm=32, mamba_n_groups=1),
    "jamba": lambda: t.JambaConfig(
        **SIZES,
        num_experts=2,
        mamba_d_state=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "lfm2": lambda: t.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "mamba": lambda: t.MambaConfig(**SHORT, state_size=4, expand=2),
    "mamba2": lambda: t.Mamba2Config(
        **SHORT, state_size=4, expand=2, head_dim=8, num_heads=4, n_groups=1
    ),
    "qwen3_next": lambda: t.Qwen3NextConfig(
        **SIZES,
        **EXPERTS,
        head_dim=4,
        shared_expert_intermediate_size=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "recurrent_gemma": lambda: t.RecurrentGemmaConfig(
        **SHORT | {"num_hidden_layers": 3},
        intermediate_size=24,
        num_attention_heads=4,
        lru_width=16,
        attention_window_size=4,
    ),
    "rwkv": lambda: t.RwkvConfig(**SHORT, attention_hidden_size=16, intermediate_size=24),
}


def try_packing(config: Any, attention: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Of the libraries, about kernels that are not installed.
        warnings.simplefilter("ignore")
        model = t.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        # Small random weights attend so evenly that a leak would hardly show.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
        attend_by_rows(model)
        rows = []
        for number, length in enumerate((9, 1, 14, 2, 6)):
            ids = tuple(torch.randint(3, 64, (length,)).tolist())
            rows.append(TokenizedRow(ids, ids, number))
        prove_packing(SummedTokenLoss(model), rows, Accelerator(cpu=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", APART)
def test_rows_are_apart(architecture, attention):
    if architecture == "llama4" and Version(t.__version__) < Version("5.23"):
        # There its chunks of attention are counted on from row to row.
        with pytest.raises(RecipeError, match="gives packed rows other losses than the same rows"):
            try_packing(APART[architecture](), attention)
    else:
        try_packing(APART[architecture](), attention)


@pytest.mark.parametrize("architecture", APART_WITH_EAGER)
def test_rows_are_apart_with_eager_attention(architecture):
    try_packing(APART_WITH_EAGER[architecture](), "eager")


@pytest.mark.parametrize("architecture", LEAKING)
def test_rows_that_would_see_each_other_are_refused(architecture):
    with pytest.raises(RecipeError, match="lets packed rows see each other: changing one row"):
        try_packing(LEAKING[architecture](), "eager")
