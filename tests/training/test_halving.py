"""`train.on_oom: halve`: the same steps with fewer rows at a time where memory runs out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kpsvd_tune.errors import RecipeError, ResourceError
from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.storage.commit import read_committed
from kpsvd_tune.training import progress
from kpsvd_tune.training.loss import SummedTokenLoss

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.50 GiB of "
    "which 1.00 GiB is free."
)
CHANGES: dict[str, Any] = {"batch_size": 4, "gradient_accumulation": 2, "on_oom": "halve"}


@contextmanager
def room_for(
    most: int, *, training: bool = True, validating: bool = True, calls: int = 10**9
) -> Iterator[list[int]]:
    """A device with room for `most` rows; the rows of each pass that began, over `calls` failures.

    A pass that does not fit draws random numbers first, as dropout does before memory runs out.
    """
    seen: list[int] = []
    original = SummedTokenLoss.forward

    def forward(self: SummedTokenLoss, *args: Any, **inputs: Any) -> Any:
        nonlocal calls
        rows = len(inputs["input_ids"])
        seen.append(rows)
        if (training if self.training else validating) and rows > most and calls > 0:
            calls -= 1
            torch.rand(7)
            raise torch.OutOfMemoryError(CUDA)
        return original(self, *args, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummedTokenLoss, "forward", forward)
        yield seen


def weights(training: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.trained_weights().items()}


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_halved_steps_are_the_same_steps(
    start_training: Callable[..., Any], rows: Any, tmp_path: Any, packing: bool, caplog: Any
) -> None:
    changes = {**CHANGES, "packing": packing}
    whole = start_training("whole", validation=rows[:5], **changes)
    expected = [metrics.loss for metrics in whole.steps()]
    assert whole.halvings() == {}
    # A packed batch is one row of all tokens: the limit is told by tokens there, so by calls.
    room = room_for(0, calls=2, validating=False) if packing else room_for(1)
    halved = start_training("halved", validation=rows[:5], **changes)
    with caplog.at_level(logging.WARNING), room as seen:
        losses = [metrics.loss for metrics in halved.steps()]
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(halved)[name], value, rtol=1e-4, atol=1e-6)
    assert halved.result().validation_loss == pytest.approx(
        whole.result().validation_loss, rel=1e-5
    )
    # From the second failure on every pass has one row.
    assert packing or set(seen[3:]) == {1}
    assert halved.halvings() == {"num_halvings": 2, "micro_batch_size": 1}
    said = [record.message for record in caplog.records if "on_oom" in record.message]
    assert len(said) == 2
    assert "out of GPU memory while" in said[0]
    assert "2.1 GB were asked for" in said[0]
    assert "passes take 2 of 4 rows at a time" in said[0]
    assert "passes take 1 of 2 rows at a time" in said[1]
    lines = [
        json.loads(line) for line in (tmp_path / "halved/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["micro_batch_size"] for line in lines] == [1] * 6
    assert "micro_batch_size" not in (tmp_path / "whole/metrics.jsonl").read_text()


@pytest.mark.slow
def test_odd_batches_are_halved_upwards(start_training: Callable[..., Any]) -> None:
    training = start_training(batch_size=5, max_steps=1, on_oom="halve")
    with room_for(3) as seen:
        list(training.steps())
    assert seen == [5, 3, 2]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_halved_batch_to_the_same_bits(
    start_training: Callable[..., Any], lora_model: Callable[..., Any], rows: Any, tmp_path: Any
) -> None:
    changes = {**CHANGES, "save_every": 2, "validation": rows[:5], "eval_every": 3}
    with room_for(2):
        list(start_training("whole", model=lora_model(dropout=0.2), **changes).steps())
    with room_for(2):
        steps = start_training("parts", model=lora_model(dropout=0.2), **changes).steps()
        for metrics in steps:
            if metrics.step == 3:
                steps.close()
                break
    # There is room enough now, and yet the run goes on as it was.
    with room_for(100) as seen:
        resumed = start_training("parts", model=lora_model(dropout=0.2), **changes)
        list(resumed.steps())
    assert resumed.halvings() == {"num_halvings": 1, "micro_batch_size": 2}
    assert max(seen) == 2
    states = [
        read_committed(tmp_path / name / "checkpoints" / "step-000006")
        for name in ("whole", "parts")
    ]
    for name in ("offsets.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert states[0][name] == states[1][name]
    assert json.loads(states[0]["state.json"])["progress"]["micro_batch_size"] == 2


@pytest.mark.slow
def test_where_memory_ran_out_leaves_no_trace_in_what_dropout_draws(
    start_training: Callable[..., Any], lora_model: Callable[..., Any]
) -> None:
    once = start_training("once", model=lora_model(dropout=0.2), **CHANGES)
    with room_for(2):
        list(once.steps())
    original = torch.rand

    def more(*args: Any, **options: Any) -> torch.Tensor:
        return original(1000) if args == (7,) else original(*args, **options)

    late = start_training("late", model=lora_model(dropout=0.2), **CHANGES)
    with pytest.MonkeyPatch.context() as patch, room_for(2):
        patch.setattr(torch, "rand", more)
        list(late.steps())
    for name, value in weights(once).items():
        assert torch.equal(weights(late)[name], value)


@pytest.mark.slow
def test_a_row_that_does_not_fit_ends_the_run_with_what_helps(
    start_training: Callable[..., Any],
) -> None:
    training = start_training(batch_size=2, on_oom="halve")
    with room_for(0), pytest.raises(ResourceError) as caught:
        list(training.steps())
    message = str(caught.value)
    assert message.startswith("out of GPU memory while computing step 1: 2.1 GB were asked for")
    assert "One row was computed at a time, after 1 halvings of train.batch_size 2" in message
    assert "train.gradient_checkpointing: true" in message
    assert training.progress.step == 0


@pytest.mark.slow
def test_validations_are_halved_too(start_training: Callable[..., Any], rows: Any) -> None:
    training = start_training(validation=rows[:5], max_steps=2, **CHANGES)
    with room_for(2, training=False) as seen:
        list(training.steps())
    assert seen[0] == 4
    assert max(seen[1:]) == 2
    assert training.halvings() == {"num_halvings": 1, "micro_batch_size": 2}


def test_without_the_key_an_error_of_memory_stays_what_it_is(
    start_training: Callable[..., Any], rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ({"validation": rows[:5]}, {}):
        training = start_training(batch_size=2, resume="never", **changes)
        with room_for(1), pytest.raises(torch.OutOfMemoryError):
            list(training.steps())
    training = start_training(batch_size=2, on_oom="halve", resume="never", validation=rows[:5])

    def fail(*args: Any, **inputs: Any) -> None:
        raise RuntimeError("another")

    monkeypatch.setattr(SummedTokenLoss, "forward", fail)
    with pytest.raises(RuntimeError, match="another"):
        list(training.steps())


@pytest.mark.parametrize(
    ("processes", "is_zero", "words"),
    [(2, False, "there are 2:"), (1, True, "DeepSpeed takes the steps:")],
)
def test_several_processes_are_refused(processes: int, is_zero: bool, words: str) -> None:
    with pytest.raises(RecipeError, match=f"works with one plain process, and {words}"):
        progress.check_halving(TrainRecipe(on_oom="halve"), processes, is_zero)
    progress.check_halving(TrainRecipe(on_oom="halve"), 1, False)
    progress.check_halving(TrainRecipe(), 2, False)
