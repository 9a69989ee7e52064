"""A tiny model with a LoRA adapter, byte rows, and trainings made of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import (  # type: ignore[import-untyped]
    AcceleratorState,
    GradientState,
    PartialState,
)
from peft import LoraConfig, PeftModel, get_peft_model

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.report.results import Event
from kpsvd_tune.runs.directory import RunDirectory, Start
from kpsvd_tune.training import Training, make_accelerator

IDENTITY = {"recipe": {"train": {"seed": 0}}}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate's state is one a process; each test starts without any."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def make_rows(num_rows: int, seed: int = 0) -> list[TokenizedRow]:
    """Rows of unequal length; the first third of each is a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_rows):
        length = int(torch.randint(6, 24, (), generator=generator))
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        # Numbers of rows in their source differ from their places in the list.
        rows.append(TokenizedRow(tuple(ids), tuple(labels), row=100 + number))
    return rows


@pytest.fixture
def rows() -> list[TokenizedRow]:
    return make_rows(10)


@pytest.fixture
def lora_model(model_factory: Callable[..., Any]) -> Callable[..., PeftModel]:
    """Makes the tiny model with an adapter that is not zero: the same one every time."""

    def make(dropout: float = 0.0, modules_to_save: list[str] | None = None) -> PeftModel:
        model = model_factory(0)
        torch.manual_seed(1)
        config = LoraConfig(
            r=2,
            lora_dropout=dropout,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            modules_to_save=modules_to_save,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # PEFT 0.21 still asks transformers 5.23 for the old name of a property.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            return get_peft_model(model, config)

    return make


def make_recipe(**changes: Any) -> TrainRecipe:
    values = {
        "max_steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "precision": "no",
        "eval_every": 0,
        "save_every": 0,
    }
    return TrainRecipe.model_validate(values | changes)


@pytest.fixture
def start_training(
    lora_model: Callable[..., PeftModel], rows: list[TokenizedRow], tmp_path: Path
) -> Callable[..., Training]:
    """Makes a training in a folder, which goes on where that folder's run stopped."""

    def start(
        folder: str = "run",
        model: PeftModel | None = None,
        validation: list[TokenizedRow] | None = None,
        train: list[TokenizedRow] | None = None,
        resume: str = "auto",
        tracking: tuple[str, ...] = (),
        tell: Callable[[Event], None] | None = None,
        **changes: Any,
    ) -> Training:
        recipe = make_recipe(**changes)
        run = RunDirectory(tmp_path / folder)
        begun: Start = run.begin("recipe", IDENTITY, {}, resume=resume)
        return Training(
            model if model is not None else lora_model(),
            train if train is not None else rows,
            validation or [],
            recipe,
            make_accelerator(recipe, tracking, run.path / "logs"),
            run,
            pad_token_id=0,
            checkpoint=begun.checkpoint,
            settings={},
            tell=tell,
        )

    return start
