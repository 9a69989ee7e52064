"""The examples of docs/hosts.md run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset  # type: ignore[import-untyped]
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from kpsvd_tune.adapter import KpsvdConfig

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_examples_run(
    tiny_model_dir: Path,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) >= 5
    rows = dict(tokenizer(["Tom has nuts.", "Ann has none."], padding=True))
    names: dict[str, Any] = {
        "rows": Dataset.from_dict(rows | {"labels": rows["input_ids"]}),
        "texts": Dataset.from_dict({"text": ["Tom has nuts.", "Ann has none."]}),
        "pairs": Dataset.from_dict(
            {
                "prompt": ["Who has nuts?", "Who has none?"],
                "chosen": [" Tom.", " Ann."],
                "rejected": [" Ann.", " Tom."],
            }
        ),
        "tokenizer": tokenizer,
    }
    for example in examples:
        names["base"] = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        names["model"] = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_model_dir),
            KpsvdConfig(target_modules=["q_proj", "v_proj"], rank=2, factor_shape="thin"),
        )
        # The only change: on a GPU a trainer asks for nothing more.
        example = example.replace('output_dir="out"', 'output_dir="out", use_cpu=True, bf16=False')
        exec(compile(example, str(PAGE), "exec"), names)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert list((tmp_path / "out").glob("checkpoint-*"))
