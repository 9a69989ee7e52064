"""Shared fixtures: a tiny Llama and a byte-level tokenizer made in memory, no network, one seed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import util
from pathlib import Path
from typing import Any

# Set before any Hugging Face library is imported: tests never look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy
import pytest
import torch
import warm
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

ROWS = [
    {"question": f"Tom has {a} nuts and finds {b} more. How many?", "answer": f"{a + b} nuts"}
    for a, b in [(1, 2), (3, 4), (5, 1), (2, 2), (7, 8), (9, 3), (4, 6), (8, 5)]
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and three special tokens, nothing learned."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    hidden_size: int = 32,
    intermediate_size: int = 48,
) -> LlamaForCausalLM:
    """A random two-layer Llama in float32; equal seeds and sizes give equal weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test starts from one seed and an empty cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)


@pytest.fixture
def warm_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `launch` start warm processes, which outlive it where it is killed."""
    monkeypatch.setattr("kpsvd_tune.launch.subprocess", warm)


@pytest.fixture
def warm_below(warm_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets what warm processes start be warm too, and what forks workers of a comparison here."""
    monkeypatch.setenv(warm.BELOW, "1")
    monkeypatch.setattr(util, "spawnv_passfds", warm.fork_server(util.spawnv_passfds))


@pytest.fixture
def quick_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets transformers read a GGUF file's fields once a test.

    It does so for each of configuration, tokenizer and weights.
    """
    gguf = pytest.importorskip("gguf")
    mapped = numpy.memmap
    # Slices of a plain array of the same memory are made several times as fast.
    monkeypatch.setattr(numpy, "memmap", lambda *a, **k: mapped(*a, **k).view(numpy.ndarray))
    monkeypatch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model_factory(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    return partial(make_model, tokenizer)


@pytest.fixture
def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer as a folder of safetensors, as a user would have it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Eight question/answer rows of our own as JSON lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_model_dir: Path, rows_file: Path) -> Callable[..., Path]:
    """Writes a recipe that trains the tiny model on six of the eight rows into `run`.

    Keys that a test gives to a section come beside those that are there already.
    """

    def write(**sections: Any) -> Path:
        content: dict[str, Any] = {
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "dataset": {
                "path": str(rows_file),
                "columns": {"prompt": "question", "completion": "answer"},
                "validation": 2,
            },
            "train": {"batch_size": 2, "precision": "no"},
            "output_dir": str(tmp_path / "run"),
        }
        for name, value in sections.items():
            known = content.get(name)
            content[name] = {**known, **value} if isinstance(known, dict) else value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    return write
