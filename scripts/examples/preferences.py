"""Train on preferences with trl: a KPSVD adapter by DPO, or a reward model.

    python scripts/examples/preferences.py MODEL ROWS.jsonl OUTPUT [--reward] [--steps 100]

Each row has a prompt, a chosen and a rejected answer. With DPO the reference is the base model
itself, with the adapter switched off, so no second copy of it is loaded. A reward model is the base
with a head of one number, which is trained whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import load_dataset  # type: ignore[import-untyped]
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from kpsvd_tune.adapter import KpsvdConfig

# A first guess, as for `train`: four terms in every linear layer.
ADAPTER: dict[str, Any] = {"target_modules": "all-linear", "rank": 4}


def main(arguments: Sequence[str] | None = None) -> Any:
    """Train, save the adapter, and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--reward", action="store_true", help="train a reward model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    settings = {
        "output_dir": str(options.output / "trainer"),
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": options.cpu,
        "bf16": not options.cpu,
    }
    # By way of Any: trl has types, and exports lazily.
    trl: Any = import_module("trl")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = load_dataset("json", data_files=str(options.rows), split="train")
    if options.reward:
        model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
        adapter = KpsvdConfig(task_type="SEQ_CLS", modules_to_save=["score"], **ADAPTER)
        config = trl.RewardConfig(**settings)
        make = trl.RewardTrainer
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        adapter = KpsvdConfig(task_type="CAUSAL_LM", **ADAPTER)
        config = trl.DPOConfig(**settings)
        make = trl.DPOTrainer
    trainer = make(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    trainer.save_model(str(options.output))
    return trainer


if __name__ == "__main__":
    main()
