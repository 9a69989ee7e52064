"""What may stand in DeepSpeed's configuration beside a recipe, and what is made of it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType  # type: ignore[import-untyped]

from kpsvd_tune.errors import RecipeError
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training import make_accelerator
from kpsvd_tune.training.engines import deepspeed_config as zero_config
from kpsvd_tune.training.engines.deepspeed import DeepSpeedEngine
from kpsvd_tune.training.engines.deepspeed_config import engine_config
from kpsvd_tune.training.loss import SummedTokenLoss

RECIPE = TrainRecipe(batch_size=2, gradient_accumulation=3, max_grad_norm=0.5, precision="bf16")
# As Accelerate makes it of its own configuration file, for a recipe in bf16.
GIVEN: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "gradient_clipping": "auto",
    "steps_per_print": float("inf"),
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "nvme_path": None},
        "offload_param": {"device": "none", "nvme_path": None},
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "fp16": {"enabled": False},
    "bf16": {"enabled": True},
}


def given(**changes: Any) -> dict[str, Any]:
    return GIVEN | changes


def zero(**changes: Any) -> dict[str, Any]:
    return given(zero_optimization=GIVEN["zero_optimization"] | changes)


def test_the_recipe_fills_in_what_is_left_to_it():
    config = engine_config(GIVEN, RECIPE, 4)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5
    # Autocast does it, as without DeepSpeed.
    assert config["bf16"] == config["fp16"] == {"enabled": False}
    assert config["zero_optimization"]["stage"] == 2
    assert "offload_param" not in config["zero_optimization"]


def test_no_clipping_in_the_recipe_is_none_in_the_engine():
    recipe = RECIPE.model_copy(update={"max_grad_norm": None})
    assert engine_config(GIVEN, recipe, 1)["gradient_clipping"] == 0.0


def test_values_that_agree_pass_and_how_data_moves_is_kept():
    agreeing = given(
        train_batch_size=24,
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=3,
        gradient_clipping=0.5,
        zero_optimization={"stage": 3, "reduce_bucket_size": 1000, "overlap_comm": "auto"},
    )
    config = engine_config(agreeing, RECIPE, 4)
    few = {"stage3_max_live_parameters": 100_000_000, "stage3_max_reuse_distance": 100_000_000}
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1000} | few


@pytest.mark.parametrize(("stage", "wanted"), [(3, 5), (3, "auto"), (2, "auto")])
def test_few_weights_stay_whole_at_stage_3_unless_it_is_said_otherwise(stage, wanted):
    config = given(zero_optimization={"stage": stage, "stage3_max_live_parameters": wanted})
    found = engine_config(config, TrainRecipe(batch_size=2, gradient_accumulation=4), 2)
    live = found["zero_optimization"].get("stage3_max_live_parameters")
    assert live == (None if stage == 2 else 5 if wanted == 5 else 100_000_000)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (given(optimizer={"type": "Adam"}), "optimizer: train.optimizer decides; take it out"),
        (given(scheduler={"type": "x"}), "scheduler: train.scheduler decides; take it out"),
        (given(gradient_clipping=1.0), "gradient_clipping: 1.0, and train.max_grad_norm is 0.5"),
        (
            given(gradient_accumulation_steps=2),
            "gradient_accumulation_steps: 2, and train.gradient_accumulation is 3",
        ),
        (
            given(train_batch_size=8),
            "train_batch_size: 8, and train.batch_size x gradient_accumulation x processes is 24",
        ),
        (
            given(train_micro_batch_size_per_gpu=8),
            "train_micro_batch_size_per_gpu: 8, and train.batch_size is 2",
        ),
        (given(fp16={"enabled": True}), "fp16.enabled: true, and train.precision is bf16"),
        (given(curriculum_learning={"enabled": True}), "curriculum_learning: not known to leave"),
        (zero(stage=4), "zero_optimization.stage: 4, expected 0, 1, 2 or 3"),
        (zero(zero_quantized_weights=True), "zero_optimization.zero_quantized_weights: not known"),
        (
            zero(offload_param={"device": "cpu"}),
            "zero_optimization.offload_param.device: cpu, expected none",
        ),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_what_contradicts_the_recipe_is_refused(config, message):
    with pytest.raises(RecipeError) as caught:
        engine_config(config, RECIPE, 4)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[1].strip().startswith(message)
    assert '"auto" leaves a value to the recipe' in lines[2]


def test_every_fault_is_named_at_once():
    with pytest.raises(RecipeError) as caught:
        engine_config(zero(stage=None) | {"optimizer": {}, "scheduler": {}}, RECIPE, 1)
    assert len(str(caught.value).splitlines()) == 5


def test_deepspeed_that_is_not_installed_is_named_with_the_cure(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero_config, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"pip install kpsvd-tune\[deepspeed\]"):
        make_accelerator(TrainRecipe(precision="no"))


class FakeAccelerator:
    distributed_type = DistributedType.MULTI_CPU
    scaler = None
    device = torch.device("cpu")


def test_deepspeed_on_accelerates_cpu_setting_is_refused_rather_than_left_out(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match="asks for DeepSpeed and for CPUs"):
        zero_config.check_parallel(FakeAccelerator(), RECIPE)


def test_fsdp_and_deepspeed_exclude_each_other(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero_config, "zero_stage", lambda _: 2)
    recipe = RECIPE.model_copy(update={"parallel": "fsdp"})
    with pytest.raises(RecipeError, match="both shard the weights"):
        zero_config.check_parallel(FakeAccelerator(), recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adafactor"}, "train.optimizer: adafactor; expected adamw or sgd"),
        ({"precision": "fp16"}, "train.precision: fp16 is not supported"),
    ],
    ids=["adafactor", "fp16"],
)
def test_recipes_that_the_engine_cannot_follow_exactly_are_refused(monkeypatch, changes, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero_config, "zero_stage", lambda _: 2)
    with pytest.raises(RecipeError, match=message):
        zero_config.check_parallel(FakeAccelerator(), RECIPE.model_copy(update=changes))


def test_trained_weights_in_half_precision_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", object())
    loss = SummedTokenLoss(torch.nn.Linear(1, 1, dtype=torch.bfloat16))
    with pytest.raises(RecipeError, match=r"needs float32 for all .*, got torch\.bfloat16"):
        DeepSpeedEngine(loss, RECIPE, FakeAccelerator(), {}, None)
