"""The memory of a device that `plan` predicts is what the run then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MOST = 0.15
HALF = {"dtype": "bfloat16"}, {"precision": "bf16"}
WHOLE = {"dtype": "float32"}, {"precision": "no"}


def command(verb: str, recipe: Path, *more: str) -> dict[str, Any]:
    """What a command of a process of its own prints: a peak is one of a process."""
    done = subprocess.run(
        [sys.executable, "-m", "kpsvd_tune", verb, str(recipe), "--json", *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.gpu  # tests/estimate/test_measured_memory.py has the CPU's
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    ("keys", "checkpointing"),
    [(WHOLE, False), (HALF, False), (HALF, True)],
    ids=["float32", "bfloat16", "bfloat16-checkpointing"],
)
def test_the_device_holds_what_the_plan_says(
    keys: tuple[dict[str, Any], dict[str, Any]],
    checkpointing: bool,
    tokenizer: PreTrainedTokenizerFast,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    # Large enough that what libraries keep on the device for themselves is little beside it.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = "stone river lamp seven green window table cloud paper bridge " * 4
    rows = [{"question": f"{number} {words}", "answer": words} for number in range(20)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, train = keys
    recipe = write_recipe(
        model={"path": str(tmp_path / "base"), **model},
        dataset={"path": str(tmp_path / "long.jsonl"), "max_length": 512},
        adapter={"rank": {"method": "fixed", "max": 4, "window": 4}},
        train={
            "max_steps": 2,
            "batch_size": 8,
            "eval_every": 0,
            "save_every": 0,
            "gradient_checkpointing": checkpointing,
            **train,
        },
    )
    predicted = command("plan", recipe)["on_device"]["peak_bytes"]
    measured = command("train", recipe)["peak_memory_bytes"]
    record_property("predicted_bytes", predicted)
    record_property("measured_bytes", measured)
    assert abs(predicted / measured - 1) <= MOST, (predicted, measured)
