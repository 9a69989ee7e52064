"""A run that was stopped and continued is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kpsvd_tune.errors import CheckpointError, StoppedBySignal
from kpsvd_tune.recipe.values import OPTIMIZERS
from kpsvd_tune.storage.commit import read_committed
from kpsvd_tune.training import loop
from kpsvd_tune.training.schedule import make_scheduler
from kpsvd_tune.training.step import Stepper

TIMING = ("seconds", "tokens_per_second", "memory_bytes")


def metric_lines(folder: Path) -> list[str]:
    """metrics.jsonl without the fields that hold times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        json.dumps({k: v for k, v in json.loads(line).items() if k not in TIMING}) for line in lines
    ]


def tensors_of(folder: Path, step: int) -> dict[str, bytes]:
    """The files of a checkpoint that hold tensors: trained ones, optimiser, random generators."""
    files = read_committed(folder / "checkpoints" / f"step-{step:06d}")
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def assert_same_run(folder: Path, other: Path, step: int) -> None:
    assert metric_lines(folder) == metric_lines(other)
    assert tensors_of(folder, step) == tensors_of(other, step)
    states = [
        json.loads(read_committed(each / "checkpoints" / f"step-{step:06d}")["state.json"])
        for each in (folder, other)
    ]
    for state in states:
        # Lines of metrics hold times, which have no fixed number of digits.
        del state["metrics_bytes"], state["progress"]["seconds"]
        # Two processes do not hold the same memory.
        del state["progress"]["peak_memory_bytes"]
    assert states[0] == states[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "arguments", "stop_at"),
    [("adamw", {}, 2)]
    + [(name, {}, 5) for name in (*OPTIMIZERS, "torch.optim.RAdam")]
    # State that exists with some arguments only.
    + [
        ("sgd", {"momentum": 0.9}, 5),
        ("torch.optim.Adam", {"amsgrad": True}, 5),
        ("torch.optim.RMSprop", {"momentum": 0.9, "centered": True}, 5),
        ("adafactor", {"beta1": 0.9}, 5),
    ],
)
def test_resumed_run_is_the_uninterrupted_run(
    start_training, lora_model, rows, tmp_path, optimizer, arguments, stop_at
):
    # Ten rows in steps of four: step 2 and step 5 end mid-epoch. Dropout draws random numbers.
    changes = {
        "optimizer": optimizer,
        "optimizer_args": arguments,
        "max_steps": 7,
        "gradient_accumulation": 2,
        "save_every": 2,
        "eval_every": 3,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "validation": rows[:3],
    }
    for _ in start_training("whole", model=lora_model(dropout=0.2), **changes).steps():
        pass
    steps = start_training("parts", model=lora_model(dropout=0.2), **changes).steps()
    for metrics in steps:
        if metrics.step == stop_at:
            steps.close()  # as if killed: steps after the last checkpoint are lost
            break
    torch.rand(100)
    # Another start of the adapter, which the checkpoint has to overwrite.
    model = lora_model(dropout=0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    resumed = start_training("parts", model=model, **changes)
    assert resumed.progress.step == stop_at - stop_at % 2
    result = [metrics.step for metrics in resumed.steps()]
    assert result == list(range(stop_at - stop_at % 2 + 1, 8))
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=7)


def test_a_finished_training_resumes_to_nothing_and_the_same_result(start_training, rows):
    training = start_training(validation=rows[:3])
    list(training.steps())
    again = start_training(validation=rows[:3])
    assert list(again.steps()) == []
    expected, result = training.result(), again.result()
    assert (result.train_loss, result.validation_loss, result.validation_loss_before) == (
        expected.train_loss,
        expected.validation_loss,
        expected.validation_loss_before,
    )
    assert result.steps == 6


def test_modules_to_save_and_their_optimiser_state_resume(start_training, lora_model, tmp_path):
    make = lambda: lora_model(modules_to_save=["lm_head"])  # noqa: E731
    list(start_training("whole", model=make()).steps())
    steps = start_training("parts", model=make(), save_every=3).steps()
    for _ in range(3):
        next(steps)
    steps.close()
    list(start_training("parts", model=make(), save_every=3).steps())
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=6)
    assert b"lm_head" in tensors_of(tmp_path / "whole", 6)["offsets.safetensors"]


def test_data_workers_change_nothing(start_training, lora_model, tmp_path):
    for folder, num_workers in (("without", 0), ("with", 2)):
        model = lora_model(dropout=0.2)
        list(start_training(folder, model=model, max_steps=4, num_workers=num_workers).steps())
    assert_same_run(tmp_path / "with", tmp_path / "without", step=4)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_packed_and_grouped_runs_resume_to_the_same_bits(
    start_training, lora_model, rows, tmp_path, num_workers
):
    changes = {
        "packing": True,
        "group_by_length": True,
        "gradient_accumulation": 2,
        "save_every": 2,
        "eval_every": 3,
        "validation": rows[:3],
    }
    model = lora_model(dropout=0.2)
    list(start_training("whole", model=model, **changes).steps())
    model = lora_model(dropout=0.2)
    steps = start_training("parts", model=model, num_workers=num_workers, **changes).steps()
    for metrics in steps:
        if metrics.step == 5:
            steps.close()
            break
    model = lora_model(dropout=0.2)
    resumed = start_training("parts", model=model, num_workers=num_workers, **changes)
    assert resumed.progress.step == 4
    list(resumed.steps())
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_stops(start_training, rows, tmp_path, number):
    list(start_training("whole").steps())
    earlier = signal.getsignal(number)
    training = start_training("parts")
    seen = []

    def train() -> None:
        for metrics in training.steps():
            seen.append(metrics.step)
            if metrics.step == 2:
                os.kill(os.getpid(), number)

    with pytest.raises(StoppedBySignal) as caught:
        train()
    # It came between steps 2 and 3; step 3 was finished, logged and saved.
    assert seen == [1, 2]
    assert caught.value.exit_code == 128 + number
    assert len(metric_lines(tmp_path / "parts")) == 3
    assert signal.getsignal(number) is earlier
    list(start_training("parts").steps())
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=6)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "amid"])
def test_a_signal_before_or_amid_a_validation_leaves_it_to_the_resumed_run(
    start_training, rows, tmp_path, monkeypatch, when
):
    changes = {"validation": rows[:6], "eval_every": 2}
    list(start_training("whole", **changes).steps())
    training = start_training("parts", **changes)
    steps = training.steps()
    next(steps)
    if when == "before":
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        loss, calls = training._stepper.token_loss, []

        def kill_at_second_batch(*_):
            calls.append(loss.training)
            if calls.count(False) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        loss.register_forward_pre_hook(kill_at_second_batch)
    with pytest.raises(StoppedBySignal):
        next(steps)
    # Step 2 is taken and saved, but its line waits for its validation loss.
    assert len(metric_lines(tmp_path / "parts")) == 1
    resumed = start_training("parts", **changes)
    assert resumed.progress.step == 2
    assert [metrics.step for metrics in resumed.steps()] == [2, 3, 4, 5, 6]
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=6)


def checkpoints(folder: Path) -> list[str]:
    return sorted(each.name for each in (folder / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, 4, 6], ids=["middle", "unsaved", "last"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_put_off_validation_leaves_the_checkpoints_of_an_uninterrupted_run(
    start_training, lora_model, rows, tmp_path, stop_at, times
):
    # Step 2 is saved as the best one or not at all, step 4 alike, step 6 as the last one.
    changes = {"validation": rows[:6], "eval_every": 2, "save_every": 3, "keep_checkpoints": 9}
    list(start_training("whole", **changes).steps())
    for _ in range(times):
        training = start_training("parts", **changes)
        loss = training._stepper.token_loss

        def stop(*_, training=training, loss=loss):
            if not loss.training and training.progress.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        loss.register_forward_pre_hook(stop)
        with pytest.raises(StoppedBySignal):
            list(training.steps())
        assert checkpoints(tmp_path / "parts")[-1] == f"step-{stop_at:06d}-pending"
    assert len(metric_lines(tmp_path / "parts")) == stop_at - 1
    resumed = start_training("parts", **changes)
    assert [metrics.step for metrics in resumed.steps()] == list(range(stop_at, 7))
    assert checkpoints(tmp_path / "parts") == checkpoints(tmp_path / "whole")
    for name in checkpoints(tmp_path / "whole"):
        assert_same_run(tmp_path / "parts", tmp_path / "whole", step=int(name[5:]))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["before", "after"])
def test_a_kill_while_the_pending_checkpoint_is_replaced_loses_nothing(
    start_training, rows, tmp_path, monkeypatch, end
):
    """Before: the finished step is not committed yet; after: the pending one is not deleted."""
    changes = {"validation": rows[:3]}
    list(start_training("whole", **changes).steps())
    training = start_training("parts", **changes)
    for metrics in training.steps():
        if metrics.step == 5:
            training._signals.requested = signal.SIGTERM
            break
    with pytest.raises(StoppedBySignal):
        list(training.steps())
    assert checkpoints(tmp_path / "parts") == ["step-000006-pending"]

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        name = "rename" if end == "before" else "remove_folder"
        patch.setattr(f"kpsvd_tune.storage.durable.{name}", kill)
        with pytest.raises(Killed):
            list(start_training("parts", resume="auto", **changes).steps())
    left = {"step-000006", "step-000006-pending"} if end == "after" else {"step-000006-pending"}
    assert {name for name in checkpoints(tmp_path / "parts") if name[0] != "."} == left
    list(start_training("parts", **changes).steps())
    assert checkpoints(tmp_path / "parts") == ["step-000006"]
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=6)


def test_a_signal_during_the_first_validation_stops_before_any_step(start_training, rows, tmp_path):
    training = start_training(validation=rows)
    training._signals.requested = signal.SIGTERM
    with pytest.raises(StoppedBySignal):
        next(training.steps())
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_early_stopping_counts_on_after_a_resume(start_training, rows, tmp_path):
    # A rate of next to nothing: no validation is a gain.
    changes = {
        "validation": rows[:3],
        "eval_every": 1,
        "save_every": 1,
        "learning_rate": 1e-12,
        "early_stopping": {"patience": 3, "min_delta": 0.1},
    }
    assert [m.step for m in start_training("whole", **changes).steps()] == [1, 2, 3, 4]
    steps = start_training("parts", **changes).steps()
    next(steps)
    next(steps)
    steps.close()
    assert [m.step for m in start_training("parts", **changes).steps()] == [3, 4]
    assert list(start_training("parts", **changes).steps()) == []
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=4)


def test_a_checkpoint_of_another_adapter_is_refused(start_training, lora_model):
    list(start_training().steps())
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*lm_head.* is missing"):
        start_training(model=lora_model(modules_to_save=["lm_head"]))


def test_an_allowed_change_of_the_rate_counts_from_the_checkpoint_on(start_training):
    steps = start_training(scheduler="linear", save_every=3).steps()
    for _ in range(3):
        next(steps)
    steps.close()
    resumed = start_training(scheduler="linear", save_every=3, learning_rate=2e-2)
    rates = [metrics.learning_rate for metrics in resumed.steps()]
    assert rates == pytest.approx([2e-2 * 3 / 6, 2e-2 * 2 / 6, 2e-2 * 1 / 6])


@pytest.mark.slow
def test_a_run_of_a_version_whose_warm_up_began_at_zero_keeps_its_schedule(
    start_training, tmp_path, monkeypatch
):
    changes = {"warmup_steps": 4, "save_every": 2, "scheduler": "linear"}

    def state(self, original=Stepper.state):
        found = original(self)
        del found["scheduler"]["starts_at_zero"]
        return found

    def of_that_version(*arguments: Any, **_: Any) -> Any:
        return make_scheduler(*arguments, starts_at_zero=True)

    with monkeypatch.context() as patch:
        patch.setattr("kpsvd_tune.training.step.make_scheduler", of_that_version)
        patch.setattr(Stepper, "state", state)
        rates = [each.learning_rate for each in start_training("whole", **changes).steps()]
        steps = start_training("parts", **changes).steps()
        next(steps)
        next(steps)
        steps.close()
    assert rates == pytest.approx([0.0, 2.5e-3, 5e-3, 7.5e-3, 1e-2, 5e-3])
    steps = start_training("parts", **changes).steps()
    next(steps)
    next(steps)
    steps.close()  # and once more, from a checkpoint of this version
    list(start_training("parts", **changes).steps())
    assert metric_lines(tmp_path / "parts") == metric_lines(tmp_path / "whole")
    new = [each.learning_rate for each in start_training("new", **changes).steps()]
    assert new == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 5e-3])


@pytest.mark.parametrize(
    ("before", "after", "is_anew"),
    [
        # Without momentum there is no state, and so none that does not fit.
        ({"optimizer": "sgd"}, {"optimizer": "adamw"}, False),
        ({"optimizer": "adamw"}, {"optimizer": "torch.optim.RMSprop"}, True),
        ({"optimizer": "sgd"}, {"optimizer": "torch.optim.Adagrad"}, True),
        ({}, {"optimizer_args": {"amsgrad": True}}, True),
        ({}, {"optimizer_args": {"betas": [0.8, 0.9]}}, False),
    ],
    ids=["sgd-adamw", "adamw-rmsprop", "sgd-adagrad", "amsgrad", "betas"],
)
def test_an_allowed_change_of_the_optimiser_begins_a_state_where_it_needs_another(
    start_training, caplog, before, after, is_anew
):
    list(start_training(max_steps=3, save_every=1, **before).steps())
    training = start_training(max_steps=5, save_every=1, **after)
    assert [each.step for each in training.steps()] == [4, 5]
    assert ("starts with a fresh state" in caplog.text) is is_anew


def test_only_logged_steps_enter_the_file_and_every_step_is_given(start_training, tmp_path):
    training = start_training(log_every=4)
    assert [metrics.step for metrics in training.steps()] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in metric_lines(tmp_path / "run")]
    # The last step is logged whatever log_every says.
    assert [line["step"] for line in lines] == [4, 6]
    assert set(lines[0]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"}


def test_the_best_checkpoint_stays_however_old(start_training, rows, tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 3.0, 4.0, 4.5, 4.4])
    monkeypatch.setattr("kpsvd_tune.training.loop.validation_loss", lambda *_: next(losses))
    training = start_training(validation=rows[:3], eval_every=1, max_steps=5, keep_checkpoints=1)
    list(training.steps())
    names = sorted(each.name for each in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000005"]
    assert training.result().best_step == 2
    # A resumed run remembers which one it was.
    again = start_training(validation=rows[:3], eval_every=1, max_steps=5, keep_checkpoints=1)
    assert (again.progress.best_step, again.progress.best_step_loss) == (2, 3.0)


@pytest.mark.slow
def test_the_best_step_is_kept_where_that_is_wanted(start_training, rows, tmp_path, monkeypatch):
    changes = {"validation": rows[:3], "eval_every": 1, "max_steps": 4, "keep_checkpoints": 1}
    # Of the whole run, then of the stopped one and of its rest.
    losses = iter([9.0, 5.0, 3.0, 4.0, 4.5, 9.0, 5.0, 3.0, 4.0, 4.5])
    monkeypatch.setattr("kpsvd_tune.training.loop.validation_loss", lambda *_: next(losses))
    whole = start_training("whole", keep="best", **changes)
    seen = {each.step: whole.trained_weights() for each in whole.steps()}
    assert len(seen) == 4
    saved = whole._run.load(whole._run.checkpoints / "step-000002").offsets
    assert all(torch.equal(saved[name], each) for name, each in whole.trained_weights().items())
    result = whole.result()
    assert (result.steps, result.validation_loss) == (4, 4.5)
    assert (result.adapter_step, result.adapter_validation_loss) == (2, 3.0)
    assert (result.best_step, result.best_validation_loss) == (2, 3.0)

    steps = start_training("parts", keep="best", **changes).steps()
    for _ in range(3):
        next(steps)
    steps.close()
    parts = start_training("parts", keep="best", **changes)
    assert parts.progress.step == 2
    # Step 3 was validated and lost.
    losses = iter([4.0, 4.5])
    list(parts.steps())
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=4)
    assert all(torch.equal(saved[name], each) for name, each in parts.trained_weights().items())


def test_the_last_step_is_kept_unless_the_best_is_wanted(start_training, rows, monkeypatch):
    losses = iter([9.0, 3.0, 4.0])
    monkeypatch.setattr("kpsvd_tune.training.loop.validation_loss", lambda *_: next(losses))
    training = start_training(validation=rows[:3], eval_every=1, max_steps=2)
    list(training.steps())
    result = training.result()
    assert (result.adapter_step, result.adapter_validation_loss) == (2, 4.0)


def test_a_best_step_that_cannot_be_read_is_an_error_with_a_way_out(
    start_training, rows, monkeypatch, tmp_path
):
    losses = iter([9.0, 3.0, 4.0])
    monkeypatch.setattr("kpsvd_tune.training.loop.validation_loss", lambda *_: next(losses))
    training = start_training(validation=rows[:3], eval_every=1, max_steps=2, keep="best")
    steps = training.steps()
    next(steps)
    next(steps)
    (tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json.*train\.keep=last --allow-change"):
        next(steps)


def test_the_most_memory_is_that_of_all_commands_of_a_run(start_training, monkeypatch):
    held = iter([300, 500, 200])
    monkeypatch.setattr(loop, "peak_memory_bytes", lambda _: next(held))
    steps = start_training(max_steps=3, save_every=1).steps()
    assert [next(steps).memory_bytes for _ in range(2)] == [300, 500]
    steps.close()
    monkeypatch.setattr(loop, "peak_memory_bytes", lambda _: 200)
    resumed = start_training(max_steps=3, save_every=1)
    assert [metrics.memory_bytes for metrics in resumed.steps()] == [500]
    assert resumed.result().peak_memory_bytes == 500
