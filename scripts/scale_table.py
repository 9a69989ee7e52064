"""Write the memory table of docs/scale.md by the functions of `plan`.

python scripts/scale_table.py

Every line is computed: no weights are made, and no GPU is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kpsvd_tune.adapter.targets import target_names
from kpsvd_tune.estimate.memory import part_of_process, training_parts
from kpsvd_tune.estimate.trace import MicroStep, trace_step
from kpsvd_tune.linalg import LayerPlan
from kpsvd_tune.recipe import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MARK = "<!-- From here on made by scripts/scale_table.py -->\n"
GPUS = (1, 2, 4, 8, 16, 32, 64)
RANK, TOKENS = 16, 2048
# Hidden size, feed-forward size, layers, heads, heads of keys and values, vocabulary: those of
# Llama 3.2 1B, Llama 2 7B and 13B, and Llama 3.1 70B.
SIZES = {
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "13B": (5120, 13824, 40, 40, 40, 32000),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}


def config(name: str) -> LlamaConfig:
    """The configuration of a model of that size."""
    hidden, wide, layers, heads, key_heads, vocabulary = SIZES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=name == "1B",
    )


def recipe(quantization: str | None, parallel: str) -> Recipe:
    """One row at a time with gradient checkpointing, in bfloat16."""
    content: dict[str, Any] = {
        "model": {"path": "-", "dtype": "bfloat16", "quantization": quantization},
        "dataset": {"path": "-", "max_length": TOKENS},
        "train": {
            "batch_size": 1,
            "precision": "bf16",
            "parallel": parallel,
            "gradient_checkpointing": True,
        },
        "output_dir": "-",
    }
    return Recipe.model_validate(content)


def parts(name: str, quantization: str | None) -> dict[str, int]:
    """Bytes of each part where one process holds everything."""
    chosen = recipe(quantization, "ddp")
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config(name))
    plans = [
        replace(
            LayerPlan.of_weight(each, (weight.shape[0], weight.shape[1]), "balanced"), rank=RANK
        )
        for each in target_names(skeleton, "all-linear", (), ())
        if isinstance(weight := skeleton.get_submodule(each).weight, torch.Tensor)
    ]
    step = MicroStep(1, TOKENS, TOKENS)
    return training_parts(
        chosen, skeleton, plans, trace_step(config(name), chosen, plans, step, "cuda")
    )


def table() -> str:
    """The table, a line for each size, kind of weights and number of GPUs."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield (
        "| base | weights kept in | GPUs | weights | adapter and gradients | optimiser "
        "| activations | in all | basis |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in SIZES:
        whole = parts(name, None)
        for count in GPUS:
            own = part_of_process(whole, recipe(None, "fsdp"), count)
            yield _line(name, "bfloat16, sharded" if count > 1 else "bfloat16", str(count), own)
        # Quantised weights are not sharded: each GPU holds a copy.
        yield _line(name, "nf4, a copy on each", "1 to 64", parts(name, "nf4"))


def _line(name: str, kept: str, count: str, found: dict[str, int]) -> str:
    columns = (
        found["weights"],
        found["adapter"] + found["gradients"],
        found["optimiser"],
        found["activations"],
        sum(found.values()),
    )
    shown = " | ".join(_gigabytes(each) for each in columns)
    return f"| {name} | {kept} | {count} | {shown} | computed |"


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f}" if number < 10e9 else f"{number / 1e9:.1f}"


if __name__ == "__main__":
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{PAGE} lacks the line {MARK!r}"
    PAGE.write_text(f"{head}{MARK}\n{table()}", encoding="utf-8")
