"""Nothing infinite or NaN reaches a weight or a file."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from kpsvd_tune.errors import NonFiniteError, StoppedBySignal
from kpsvd_tune.training import Training
from kpsvd_tune.training.progress import find_fault


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_planted_value_stops_the_run_before_the_step(start_training, lora_model, tmp_path, value):
    model = lora_model()
    training = start_training(model=model, save_every=1)
    steps = training.steps()
    next(steps)
    next(steps)
    before = weights(model)
    model.base_model.model.lm_head.weight.data[:, 0] = value
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan on process 0") as caught:
        next(steps)
    assert caught.value.exit_code == 3
    expected = [100 + index for index in training._sampler.batch(2, 0, 0)]
    assert f"rows {expected[0]}, {expected[1]}. " in str(caught.value)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])
    names = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_infinite_gradient_under_a_finite_loss_stops_the_run(start_training, lora_model):
    model = lora_model()
    training = start_training(model=model, gradient_accumulation=2)
    before = weights(model)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient norm is (nan|inf) while every"):
        next(training.steps())
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])


def test_message_names_the_process_and_shortens_long_lists_of_rows():
    fault = find_fault(7, [1.0, math.inf], 1.0, lambda process: range(20 * process))
    assert fault is not None
    assert fault.startswith("step 7: the loss is inf on process 1, in one of the rows 0, 1, 2")
    assert fault.endswith(" 15 and 4 more")
    fault = find_fault(7, [1.0, 1.0], math.inf, lambda process: [5])
    assert fault is not None
    assert "norm is inf while every loss is finite" in fault
    assert fault.endswith("on processes 0 to 1: 5, 5")


def test_finite_numbers_and_a_norm_left_to_the_scaler_pass():
    assert find_fault(7, [1.0, 2.0], 3.0, lambda process: []) is None
    assert find_fault(7, [1.0, 2.0], None, lambda process: []) is None
    assert find_fault(7, [1.0, 2.0], math.inf, lambda process: []) is not None


def spoil(model, training, steps, times=99):
    """Make the loss NaN in the given steps, as long as `times` lasts."""
    left = [times]

    def hook(_module, _inputs, output):
        step = training().progress.step + 1
        if model.training and step in steps and left[0] > 0:
            left[0] -= 1
            return output * math.nan
        return output

    model.get_output_embeddings().register_forward_hook(hook)


def run_spoiled(start_training, model, folder, steps, times=99, **changes):
    holder: list[Training] = []
    spoil(model, lambda: holder[0], steps, times)
    holder.append(start_training(folder, model=model, **changes))
    return holder[0]


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_skipped_steps_move_nothing_and_are_logged(start_training, lora_model, tmp_path, caplog):
    model = lora_model()
    training = run_spoiled(
        start_training, model, "run", {3, 4}, on_nonfinite="skip", save_every=1, log_every=6
    )
    seen = {}
    with caplog.at_level(logging.WARNING):
        for metrics in training.steps():
            seen[metrics.step] = weights(model)
            assert (metrics.skipped is not None) == (metrics.step in (3, 4))
    for name, tensor in seen[2].items():
        assert torch.equal(seen[3][name], tensor)
        assert torch.equal(seen[4][name], tensor)
        assert bool((seen[5][name] != tensor).any())
    # Skipped ones get their line whatever log_every says, and say why.
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [3, 4, 6]
    assert logged[0]["loss"] is None
    assert logged[0]["skipped"].startswith("step 3: the loss is nan on process 0, in one of the")
    assert "the step was skipped (2 in a row, 2 in all)" in caplog.text
    assert math.isfinite(training.result().train_loss)


@pytest.mark.slow
def test_a_run_with_skips_resumes_to_the_same_bits(start_training, lora_model, tmp_path):
    changes = {"on_nonfinite": "skip", "save_every": 3, "max_steps": 8}
    steps = {2, 4}
    list(run_spoiled(start_training, lora_model(), "whole", steps, **changes).steps())
    for metrics in (
        parts := run_spoiled(start_training, lora_model(), "parts", steps, **changes).steps()
    ):
        if metrics.step == 5:
            parts.close()
    resumed = run_spoiled(start_training, lora_model(), "parts", steps, **changes)
    assert (resumed.progress.step, resumed.progress.num_skipped) == (3, 1)
    list(resumed.steps())
    assert resumed.progress.num_skipped == 2
    files = [
        (tmp_path / folder / "checkpoints" / "step-000008" / "offsets.safetensors").read_bytes()
        for folder in ("whole", "parts")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("steps", "limits", "at", "message"),
    [
        ({2, 3, 4}, {"max_streak": 2}, 4, r"step 4: .* step 3 in a row to be skipped.*max_streak"),
        ({1, 3, 5}, {"max_total": 2}, 5, r"step 5: .* step 3 in all to be skipped.*max_total is 2"),
    ],
)
def test_too_many_skips_end_the_run(start_training, lora_model, steps, limits, at, message):
    training = run_spoiled(
        start_training, lora_model(), "run", steps, on_nonfinite="skip", nonfinite=limits
    )
    with pytest.raises(NonFiniteError, match=message):
        list(training.steps())
    assert training.progress.step == at - 1


def test_a_retry_goes_back_and_on_with_a_lower_rate(start_training, lora_model, tmp_path, caplog):
    training = run_spoiled(
        start_training,
        lora_model(dropout=0.2),
        "run",
        {4},
        times=1,
        on_nonfinite="retry",
        save_every=2,
        scheduler="constant",
        nonfinite={"retry_factor": 0.25},
    )
    with caplog.at_level(logging.WARNING):
        steps = [metrics.step for metrics in training.steps()]
    assert steps == [1, 2, 3, 3, 4, 5, 6]
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in logged] == [1e-2] * 2 + [2.5e-3] * 4
    assert "Going back to step-000002 with 0.25 times the learning rate (retry 1 of 2)" in (
        caplog.text
    )


def test_retries_before_the_first_checkpoint_and_their_end(start_training, lora_model, tmp_path):
    model = lora_model()
    before = weights(model)
    training = run_spoiled(start_training, model, "run", {2}, on_nonfinite="retry")
    steps: list[int] = []
    with pytest.raises(NonFiniteError, match=r"tried again 2 times, the last one with 0\.25 times"):
        steps.extend(metrics.step for metrics in training.steps())
    assert (tmp_path / "run" / "checkpoints" / "step-000000").is_dir()
    # Step 1 was taken three times from the same start, each time with a lower rate.
    rates = [group["lr"] for group in training._stepper._engine.optimizer.param_groups]
    assert rates[0] < 1e-2
    assert any(bool((weights(model)[name] != tensor).any()) for name, tensor in before.items())


@pytest.mark.slow
def test_a_resumed_retry_keeps_its_lower_rate(start_training, lora_model):
    changes = {"on_nonfinite": "retry", "save_every": 1, "scheduler": "constant"}
    training = run_spoiled(start_training, lora_model(), "run", {3}, times=1, **changes)
    for metrics in (steps := training.steps()):
        if metrics.step == 4:
            steps.close()
    resumed = start_training("run", **changes)
    assert (resumed.progress.num_retries, resumed.progress.rate_factor) == (1, 0.5)
    assert {metrics.learning_rate for metrics in resumed.steps()} == {5e-3}


def test_a_signal_in_a_skipped_step_leaves_its_line_to_the_resumed_run(
    start_training, lora_model, rows, tmp_path
):
    changes = {"on_nonfinite": "skip", "eval_every": 2, "validation": rows[:3]}
    training = run_spoiled(start_training, lora_model(), "run", {2}, **changes)
    steps = training.steps()
    next(steps)
    training._signals.requested = 15
    with pytest.raises(StoppedBySignal):
        next(steps)
    resumed = run_spoiled(start_training, lora_model(), "run", {2}, **changes)
    assert [metrics.step for metrics in resumed.steps()] == [2, 3, 4, 5, 6]
    skipped = lines(tmp_path / "run")[1]
    assert (skipped["loss"], skipped["step"]) == (None, 2)
    assert skipped["validation_loss"] > 0
    assert skipped["skipped"].startswith("step 2: the loss is nan")
