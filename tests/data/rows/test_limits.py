"""The model's limits: read from its configuration, proved on the model, held against rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from kpsvd_tune.commands import main as cli
from kpsvd_tune.data import prepare
from kpsvd_tune.data.rows.preflight import ModelLimits, model_limits
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

_SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 16,
    },
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "rotary_dim": 4},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 16,
    },
    "biogpt": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 16},
    "roberta": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 18,
        "pad_token_id": 1,
        "is_decoder": True,
    },
}


@pytest.mark.parametrize("name", _SMALL)
def test_a_model_takes_rows_of_its_limit_and_none_longer(name: str) -> None:
    config = AutoConfig.for_model(name, vocab_size=64, **_SMALL[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    limits = model_limits(model)
    assert limits == ModelLimits(16, True, 64)
    assert torch.isfinite(model(torch.full((1, 16), 5)).logits).all()
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 17), 5))


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("llama", {"max_position_embeddings": 64}, 64),
        (
            "qwen2",
            {
                "max_position_embeddings": 64,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            256,
        ),
        (
            "llama",  # Llama 3.1 names the stretched length itself
            {
                "max_position_embeddings": 512,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            512,
        ),
        ("bloom", {}, None),
        ("mamba", {}, None),
    ],
)
def test_rotary_and_other_positions_end_softly_or_never(
    name: str, keys: dict[str, Any], expected: int | None
) -> None:
    config = AutoConfig.for_model(name, vocab_size=64, hidden_size=32, num_hidden_layers=1, **keys)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model_limits(model) == ModelLimits(expected, False, 64)


def _rows(tmp_path: Path) -> str:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "a", "completion": "b" * length} for length in (5, 60, 5, 90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_beyond_hard_and_soft_limits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = _rows(tmp_path)

    def read(limits: ModelLimits, **keys: Any) -> tuple[str, ...]:
        recipe = DatasetRecipe(path=path, **{"validation": 0, **keys})
        return prepare(recipe, tokenizer, seed=0, limits=limits).report.warnings

    hard = ModelLimits(64, True, 300)
    with pytest.raises(
        DataError,
        match=r"^2 rows have more tokens than the 64 that the model takes .*line 2, 81 tokens\); "
        r"it has no positions beyond: set dataset\.max_length to 64 \(now 512\), .* "
        r"dataset\.too_long=drop; or take a model with more positions",
    ):
        read(hard)
    assert not any("LONG" in each for each in read(hard, max_length=64))
    assert not any("LONG" in each for each in read(hard, max_length=64, too_long="drop"))
    (note, *_) = read(ModelLimits(64, False, 300))
    assert note.startswith("LONG ROWS: 2 rows have more tokens than the 64")
    assert "rope_scaling" in note
    assert not any("LONG" in each for each in read(ModelLimits(None, False, 300)))
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = DatasetRecipe(path=str(short), validation=path)
    with pytest.raises(DataError, match="2 rows have more tokens than the 64"):
        # Held-out rows go through the model too.
        prepare(recipe, tokenizer, seed=0, limits=hard)


def test_a_token_that_the_model_lacks_is_refused_with_its_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = DatasetRecipe(path=_rows(tmp_path), validation=0)
    with pytest.raises(DataError, match=r"long\.jsonl, line 1: token id \d+ has no embedding, the"):
        prepare(recipe, tokenizer, seed=0, limits=ModelLimits(512, False, 50))


@pytest.mark.parametrize("options", [["--dry-run"], []])
@pytest.mark.parametrize("fault", ["positions", "vocabulary"])
def test_both_are_refused_before_anything_is_decomposed(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    fault: str,
) -> None:
    config = GPT2Config(
        vocab_size=len(tokenizer) if fault == "positions" else 200,
        n_positions=64,
        n_embd=32,
        n_layer=1,
        n_head=4,
    )
    model = tmp_path / "model"
    GPT2LMHeadModel(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {model}, dtype: float32}}\n"
        f"dataset: {{path: {_rows(tmp_path)}, validation: 0}}\n"
        f"train: {{max_steps: 1, precision: 'no'}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    assert cli.run(["train", str(recipe), *options]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert ("it has no positions beyond" if fault == "positions" else "has no embedding") in told
    assert "decomposing" not in told
    assert not (tmp_path / "run" / "init").exists()
