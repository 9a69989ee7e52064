"""transformers' Trainer and trl's SFTTrainer train and save a KPSVD model as they are."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kpsvd_tune.adapter import KpsvdConfig

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
IDS = torch.arange(24).reshape(2, 12)
TEXTS = [f"Tom has {a} nuts and finds {b} more: {a + b} nuts." for a in range(3) for b in range(4)]


def config() -> KpsvdConfig:
    return KpsvdConfig(target_modules="all-linear", rank=2, task_type="CAUSAL_LM")


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        "bf16": False,
    }
    return settings | changes


def make_trainer(kind: str, model: Any, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    """A trainer of a model without an adapter; SFTTrainer puts it on by itself."""
    if kind == "trl":
        # By way of Any: trl has types, and exports lazily.
        trl: Any = import_module("trl")
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**arguments(folder, **changes), max_length=64),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
            peft_config=config(),
        )
    rows = tokenizer(TEXTS, padding=True)
    rows["labels"] = rows["input_ids"]
    dataset = Dataset.from_dict(dict(rows))
    return Trainer(
        model=get_peft_model(model, config()),
        args=TrainingArguments(**arguments(folder, **changes)),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_ten_steps_save_and_resume(
    kind: str,
    checkpointing: bool,
    model_factory: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    base = {name: p.clone() for name, p in model_factory().named_parameters()}
    options = {"gradient_checkpointing": checkpointing}
    trainer = make_trainer(kind, model_factory(), tokenizer, tmp_path / "whole", **options)
    trained = trainer.model
    assert {type(each).__name__ for each in trained.peft_config.values()} == {"KpsvdConfig"}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in trained.get_base_model().named_parameters():
        plain = name.replace(".base_layer", "")
        assert plain not in base or torch.equal(parameter, base[plain]), "the base was moved"

    trainer.save_model(str(tmp_path / "saved"))
    expected = logits(trained)
    loaded = PeftModel.from_pretrained(model_factory(), tmp_path / "saved")
    assert torch.equal(logits(loaded), expected)

    # Another process goes on from step 5 and ends where the first one ended.
    resumed = make_trainer(kind, model_factory(), tokenizer, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.state.global_step == 10
    assert torch.equal(logits(resumed.model), expected)
    last = get_last_checkpoint(str(tmp_path / "whole"))
    assert last is not None
    assert torch.equal(logits(PeftModel.from_pretrained(model_factory(), last)), expected)


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(
    model_factory: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(
        "transformers",
        model_factory(),
        tokenizer,
        tmp_path,
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        # The loss falls, and the highest is called the best: the earlier checkpoint.
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith("checkpoint-2")
    loaded = PeftModel.from_pretrained(model_factory(), best)
    assert torch.equal(logits(trainer.model), logits(loaded))


@pytest.mark.slow
def test_trl_evaluates_against_the_base_with_the_adapter_disabled(
    model_factory: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """What preference trainers do for a reference model: the same weights, adapter off."""
    trainer = make_trainer("trl", model_factory(), tokenizer, tmp_path)
    trainer.train()
    with trainer.model.disable_adapter():
        reference = logits(trainer.model)
    assert torch.equal(reference, logits(model_factory()))
