"""What `train.fallback` does by itself: in its order, counted, told, resumed to the same bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.errors import NonFiniteError
from kpsvd_tune.report.results import Event
from kpsvd_tune.training import Training

# A rate at which the tiny model is lost within a few steps; a hundredth of it is a good one.
WILD: dict[str, Any] = {
    "fallback": ["lower_rate", "keep_best"],
    "learning_rate": 1.0,
    "nonfinite": {"retry_factor": 0.005},
    "max_steps": 24,
    "eval_every": 4,
    "save_every": 4,
    "scheduler": "constant",
}


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for times and memory."""
    timed = ("seconds", "tokens_per_second", "memory_bytes")
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


def offsets(run: Path) -> bytes:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return (newest / "offsets.safetensors").read_bytes()


def told_by(told: list[Event]) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        if event.kind == "fallback" or event.code not in [each.code for each in told]:
            told.append(event)

    return tell


def spoiled(model: Any, holder: list[Training], steps: Collection[int], times: int = 99) -> Any:
    """The model with a loss of NaN in the given steps, as long as `times` lasts."""
    left = [times]

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if model.training and holder[0].progress.step + 1 in steps and left[0] > 0:
            left[0] -= 1
            return output * math.nan
        return output

    model.get_output_embeddings().register_forward_hook(hook)
    return model


@pytest.fixture
def start(start_training: Callable[..., Training], lora_model: Callable[..., Any]) -> Any:
    def make(
        folder: str, told: list[Event], steps: Collection[int] = (), times: int = 99, **changes: Any
    ) -> Training:
        holder: list[Training] = []
        # With an output head of its own the model can be lost; a small adapter alone cannot.
        model = lora_model(modules_to_save=["lm_head"])
        model = spoiled(model, holder, steps, times)
        holder.append(start_training(folder, model=model, tell=told_by(told), **changes))
        return holder[0]

    return make


def test_a_run_that_diverges_goes_back_to_when_it_was_well_with_a_lower_rate(start, rows, tmp_path):
    told: list[Event] = []
    training = start("run", told, validation=rows[:4], **WILD)
    list(training.steps())
    assert [event.code for event in told][:2] == ["divergence", "lower_rate"]
    fallback = told[1]
    assert fallback.kind == "fallback"
    # Every validation was worse than the start, so the start is what is left of the good.
    assert fallback.evidence["checkpoint"] == "step-000000"
    assert "Going back to step-000000 with 0.005 times the learning rate" in fallback.text
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == list(range(1, 25))
    assert {line["learning_rate"] for line in logged} == {0.005}
    assert training.fallbacks() == {"fallbacks": {"lower_rate": 1}}
    assert training.progress.validation_loss < training.progress.validation_loss_before


def test_a_diverging_run_without_fallback_is_warned_of_and_goes_on(start, rows):
    told: list[Event] = []
    training = start("run", told, validation=rows[:4], **WILD | {"fallback": []})
    assert len(list(training.steps())) == 24
    assert "divergence" in [event.code for event in told]
    assert all(event.kind == "warning" for event in told)
    assert training.fallbacks() == {}


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 2, 5])
def test_a_kill_between_fallback_and_checkpoint_changes_no_bit(start, rows, tmp_path, stop_after):
    whole: list[Event] = []
    list(start("whole", whole, validation=rows[:4], **WILD).steps())
    parts: list[Event] = []
    training = start("parts", parts, validation=rows[:4], **WILD)
    steps = training.steps()
    num_after = 0
    for _ in steps:
        num_after += training.progress.num_retries
        if num_after == stop_after:
            break
    # As a kill: nothing is saved any more.
    steps.close()
    assert training.progress.num_retries == 1
    resumed = start("parts", parts, validation=rows[:4], **WILD)
    assert resumed.progress.step == (4 if stop_after > 4 else 0)
    list(resumed.steps())
    assert resumed.progress.num_retries == 1
    assert offsets(tmp_path / "parts") == offsets(tmp_path / "whole")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_batches_are_skipped_first_and_then_the_rate_is_lowered(start, tmp_path):
    told: list[Event] = []
    training = start(
        "run",
        told,
        {3, 4},
        times=2,
        fallback=["skip_batch", "lower_rate"],
        nonfinite={"max_streak": 1},
        save_every=1,
        max_steps=6,
        scheduler="constant",
    )
    list(training.steps())
    assert [event.code for event in told] == ["skip_batch", "lower_rate"]
    assert [event.step for event in told] == [3, 3]
    assert training.progress.rate_factor == 0.5
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_the_best_step_is_kept_where_nothing_else_is_left(start, rows, tmp_path):
    told: list[Event] = []
    changes = {"eval_every": 2, "validation": rows[:4], "max_steps": 8}
    training = start("run", told, {5}, fallback=["lower_rate", "keep_best"], **changes)
    assert max(metrics.step for metrics in training.steps()) == 4
    assert [event.code for event in told] == ["lower_rate", "lower_rate", "keep_best"]
    assert "The run ends here with the adapter of step 4, the best one" in told[2].text
    result = training.result()
    assert (result.steps, result.adapter_step) == (4, 4)
    assert training.fallbacks() == {"fallbacks": {"lower_rate": 2, "keep_best": 1}}
    # A run that is rebuilt from its checkpoint ends in the same way.
    again = start("run", told, {5}, fallback=["lower_rate", "keep_best"], **changes)
    list(again.steps())
    assert again.progress.keeps_best


def test_a_fallback_that_is_used_up_ends_the_run_and_says_so(start):
    changes = {"fallback": ["skip_batch"], "nonfinite": {"max_streak": 2}}
    training = start("run", [], range(2, 7), **changes)
    with pytest.raises(
        NonFiniteError,
        match=r"step 4: the loss is nan.*train.fallback has nothing left: skip_batch left out 2",
    ):
        list(training.steps())
