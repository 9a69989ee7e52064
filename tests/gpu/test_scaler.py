"""The loss scaler of fp16. On a CPU, which has no fp16 training, one is planted in float32."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.storage.commit import read_committed
from kpsvd_tune.training import Training, make_accelerator

RUNS = Path(__file__).parents[1] / "training" / "two_processes.py"
OVERFLOWS = 3  # the step whose gradient is infinite


@pytest.fixture
def start(device: str, tmp_path: Path) -> Callable[[str], Training]:
    """Makes a training in a folder, or goes on with the one there; one step overflows."""
    made: dict[str, Any] = runpy.run_path(str(RUNS))

    def make(folder: str) -> Training:
        recipe = TrainRecipe.model_validate(
            {
                "max_steps": 6,
                "batch_size": 2,
                "learning_rate": 1e-2,
                "precision": "fp16" if device == "cuda" else "no",
                "eval_every": 0,
                "save_every": 1,
            }
        )
        accelerator = make_accelerator(recipe)
        if device == "cpu":
            accelerator.scaler = torch.amp.GradScaler("cpu")
        model = made["make_model"](dropout=0.2)
        run = RunDirectory(tmp_path / folder)
        training = Training(
            model,
            made["make_rows"](12),
            [],
            recipe,
            accelerator,
            run,
            pad_token_id=0,
            checkpoint=run.begin("recipe", {}, {}).checkpoint,
            settings={},
        )
        trained = next(each for each in model.parameters() if each.requires_grad)
        trained.register_hook(
            lambda gradient: (
                gradient * math.inf if training.progress.step + 1 == OVERFLOWS else gradient
            )
        )
        return training

    return make


def scale(training: Training) -> float:
    state = training._stepper.state()["scheduler"]["scaler"]
    return float(state["scale"])


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in training.trained_weights().items()}


@pytest.mark.slow
def test_a_step_that_overflows_is_skipped_and_the_run_goes_on_and_resumes(
    start: Callable[[str], Training], tmp_path: Path
) -> None:
    training = start("whole")
    moved, scales = [weights(training)], []
    norms = []
    for metrics in training.steps():
        moved.append(weights(training))
        scales.append(scale(training))
        norms.append(metrics.grad_norm)
    assert scales[OVERFLOWS - 1] == scales[OVERFLOWS - 2] / 2
    assert scales[OVERFLOWS:] == [scales[OVERFLOWS - 1]] * (6 - OVERFLOWS)
    for step, (before, after) in enumerate(zip(moved, moved[1:], strict=False), start=1):
        is_same = all(torch.equal(each, after[name]) for name, each in before.items())
        # A first scale that is too large may overflow by itself in the first steps.
        assert is_same == (not math.isfinite(norms[step - 1]))
    assert not math.isfinite(norms[OVERFLOWS - 1])
    assert all(map(math.isfinite, norms[OVERFLOWS:]))
    for tensor in moved[-1].values():
        assert bool(tensor.isfinite().all())

    parts = start("parts")
    for metrics in (steps := parts.steps()):
        if metrics.step == OVERFLOWS:
            steps.close()
    resumed = start("parts")
    assert resumed.progress.step == OVERFLOWS
    assert scale(resumed) == scales[OVERFLOWS - 1], "the smaller scale is kept"
    list(resumed.steps())
    whole, again = (
        read_committed(tmp_path / name / "checkpoints" / "step-000006")
        for name in ("whole", "parts")
    )
    for name in ("offsets.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert whole[name] == again[name], name
