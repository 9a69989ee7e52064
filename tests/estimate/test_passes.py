"""Forward passes and loading, by sizes of the model's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig, MixtralConfig, Qwen3MoeConfig

from kpsvd_tune.estimate import loading
from kpsvd_tune.estimate.answers import answering_seconds
from kpsvd_tune.estimate.memory import cache_bytes, pass_bytes
from kpsvd_tune.estimate.passes import PassTimes
from kpsvd_tune.models import ModelSource
from kpsvd_tune.models.loading import build_model
from kpsvd_tune.recipe import EvaluationRecipe

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 300,
}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**SIZES, **HEADS)
IN_LAYERS = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)


def skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return build_model(config)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A second for each multiply-add of a product, and nothing for a call; the sizes probed."""
    sizes: list[tuple[int, int, int]] = []

    def product(self: PassTimes, out: int, inside: int, rows: int) -> float:
        sizes.append((out, inside, rows))
        return float(out * inside * rows)

    monkeypatch.setattr(PassTimes, "_product", product)
    monkeypatch.setattr(PassTimes, "_call_seconds", lambda _: 0.0)
    return sizes


def test_a_pass_multiplies_every_layer_and_has_logits_of_last_tokens(
    probed: list[tuple[int, int, int]],
) -> None:
    times = PassTimes(skeleton(LLAMA), torch.float32, CPU)
    assert times.seconds(2, 5) == 10 * IN_LAYERS + 2 * 300 * 32
    assert (300, 32, 2) in probed
    gpt2 = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=300)
    # GPT-2 stores its weights transposed: attention 3 + 1, MLP 4 + 4 squares a layer.
    assert PassTimes(skeleton(gpt2), torch.float32, CPU).seconds(1, 1) == (
        pytest.approx(2 * 12 * 32 * 32 + 300 * 32, rel=0.01)
    )


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3MoeConfig])
def test_experts_count_by_the_tokens_that_reach_them(
    kind: Any, probed: list[tuple[int, int, int]]
) -> None:
    sizes: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 8}
    config = kind(**SIZES, **HEADS, **sizes, num_local_experts=8)
    times = PassTimes(skeleton(config), torch.float32, CPU)
    # Of 8 experts a token meets 2, and the router's weights for all.
    active = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 8 * 32 + 2 * 3 * 48 * 32)
    for tokens in (1, 6, 40):
        expected = tokens * active + 300 * 32
        assert times.seconds(1, tokens) == pytest.approx(expected), tokens
    # 40 tokens are 10 for each expert: its weights are read once for these.
    assert {rows for out, _, rows in probed if out != 300} == {1, 2, 6, 10, 40}


def test_a_head_of_a_large_vocabulary_is_probed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []

    def ones(*shape: int, **options: Any) -> torch.Tensor:
        largest.append(shape[0] * shape[1] * options["dtype"].itemsize)
        return torch.empty(*shape, **{**options, "device": "meta"})

    times = PassTimes(skeleton(LLAMA), torch.float32, CPU)
    monkeypatch.setattr("kpsvd_tune.estimate.passes.torch.ones", ones)
    monkeypatch.setattr(PassTimes, "_timed", lambda *_: 1.0)
    # 16,384 outputs of 2048 numbers in float32 are 2^27 bytes.
    assert times._product(128_256, 2048, 4) == pytest.approx(128_256 / 16_384)
    assert max(largest) == 1 << 27


def test_a_probe_is_made_once_for_like_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def timed(_: PassTimes, call: object) -> float:
        calls.append(call)
        return 1.0

    monkeypatch.setattr(PassTimes, "_timed", timed)
    times = PassTimes(skeleton(LLAMA), torch.float32, CPU)
    one = times.seconds(4, 40)
    count = len(calls)
    # 160 and 200 tokens are both taken as 128.
    assert times.seconds(4, 50) > one
    assert len(calls) == count
    more = PassTimes(skeleton(LLAMA), torch.float32, CPU, adapted=21)
    assert more.seconds(4, 40) > one


def test_answers_take_a_pass_a_batch_and_one_a_token(
    probed: list[tuple[int, int, int]],
) -> None:
    task = EvaluationRecipe(task="exact_match", path="a.jsonl", batch_size=2, max_new_tokens=3)
    low, high = answering_seconds(PassTimes(skeleton(LLAMA), torch.float32, CPU), task, [4, 10, 6])
    # Longest first: 10 and 6 tokens together, then 4.
    reading = (2 * 10 + 4) * IN_LAYERS + 3 * 300 * 32
    assert low == pytest.approx(0.7 * reading)
    assert high == pytest.approx(2.5 * (reading + 2 * 3 * (IN_LAYERS + 300 * 32)))


def test_keys_values_and_one_layer_are_what_answers_hold() -> None:
    model = skeleton(LLAMA)
    # Two heads of 8 numbers in each of 3 layers, for keys and for values.
    assert cache_bytes(model, "float32", 2, 10) == 2 * 3 * 2 * 8 * 20 * 4
    assert pass_bytes(model, "bfloat16", 2, 10) == 2 * (20 * (4 * 32 + 3 * 48) + 2 * 2 * 300)
    other = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=300)
    assert cache_bytes(skeleton(other), "float32", 2, 10) is None


@pytest.mark.slow
def test_a_pass_takes_time_here() -> None:
    times = PassTimes(skeleton(LLAMA), torch.bfloat16, CPU, adapted=2)
    assert 0 < times.seconds(1, 1) < times.seconds(16, 64)


def test_a_gguf_file_is_loaded_twice_and_costs_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "python_slowness", lambda: (1.0, 2.0))
    model = skeleton(LLAMA)
    gguf = ModelSource("m", "gguf", Path(), (Path("m.gguf"),))
    plain = replace(gguf, kind="folder", weight_files=(Path("m.safetensors"),))

    def seconds(source: ModelSource, decomposes: bool) -> tuple[float, float]:
        return loading.loading_seconds(source, model, "float32", decomposes=decomposes)

    low, high = seconds(plain, True)
    assert 0 == low < high
    assert seconds(plain, False) == (low, high)
    once, twice = seconds(gguf, False), seconds(gguf, True)
    assert twice == pytest.approx([2 * each for each in once])
    # As busy as now at the most, left alone at the least.
    assert once[1] - high == pytest.approx(2 * once[0] * 2.5 / 0.7)


@pytest.mark.slow
def test_python_is_as_fast_as_it_is() -> None:
    alone, now = loading.python_slowness()
    assert 0 < alone <= now * 1.05
