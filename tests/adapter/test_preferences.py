"""trl's DPOTrainer and RewardTrainer train a KPSVD adapter, by the example script."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kpsvd_tune.commands import main as cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SCRIPT = Path(__file__).parents[2] / "scripts" / "examples" / "preferences.py"
ROWS = [
    {"prompt": f"How many are {a} and {b}?", "chosen": f" {a + b} nuts", "rejected": " no idea"}
    for a in range(4)
    for b in range(4)
]
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def example(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run the script for ten steps on the tiny model."""
    spec = importlib.util.spec_from_file_location("preferences", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*options: str) -> Any:
        return module.main(
            [str(tiny_model_dir), str(rows), str(tmp_path / "out"), "--steps", "10", "--cpu"]
            + ["--learning-rate", "1e-2", *options]
        )

    return run


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_dpo_trains_ten_steps_against_the_base_with_the_adapter_off(
    example: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = example()
    found = losses(trainer)
    assert len(found) == 10
    # Adapter and reference are the same model at the start: log 2.
    assert found[0] == pytest.approx(0.6931, abs=1e-3)
    assert found[-1] < found[0] - 0.1
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(base))
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert type(loaded.peft_config["default"]).__name__ == "KpsvdConfig"
    torch.testing.assert_close(logits(loaded), logits(trainer.model))


def test_a_reward_model_trains_ten_steps_with_its_head(
    example: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = example("--reward")
    found = losses(trainer)
    assert len(found) == 10
    assert found[-1] < found[0] - 0.1
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    base.config.pad_token_id = trainer.model.config.pad_token_id
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(trainer.model))


def test_train_refuses_preferences_and_names_the_page(
    write_recipe: Callable[..., Path], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(dataset={"path": str(rows), "columns": {}})
    assert cli.run(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "these are rows of preferences" in said
    assert "to train on preferences: docs/hosts.md, Preferences" in said
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text("utf-8")
    assert "\n## Preferences\n" in page
    assert "scripts/examples/preferences.py" in page
