"""How long a run is, and what is refused or told before its first step."""

from __future__ import annotations

import pytest

from kpsvd_tune.recipe import TrainRecipe
from kpsvd_tune.training.schedule import RunLength, num_warmup_steps, run_length


def length(num_rows: int = 100, num_validation: int = 10, **values: object) -> RunLength:
    return run_length(TrainRecipe.model_validate(values), num_rows, num_validation)


def test_steps_and_passes_are_told_first():
    found = length(max_steps=45, batch_size=4, gradient_accumulation=2)
    assert (found.num_steps, found.passes, found.faults) == (45, 3.6, ())
    assert found.notes == ("45 steps of 8 rows: 3.6 passes over 100 rows",)
    assert length(epochs=2, batch_size=4).notes == ("50 steps of 4 rows: 2 passes over 100 rows",)
    assert run_length(TrainRecipe(batch_size=4), 100, 10, 2).num_steps == 13


def test_an_ordinary_run_has_nothing_else_to_tell():
    found = length(1000, 20, epochs=3, eval_every=50, save_every=50, warmup_steps=10)
    assert len(found.notes) == 1
    assert not found.faults


def test_fewer_rows_than_a_step_takes_are_told():
    first, repeated, passes = length(3, 1, batch_size=8).notes
    assert first == "1 step of 8 rows: 2.67 passes over 3 rows"
    assert "one step takes 8 rows and there are 3" in repeated
    assert "lower train.batch_size, train.gradient_accumulation" in repeated
    assert "train.epochs asks for 1 passes and whole steps make 2.67" in passes
    # Whole steps round up by no more than a tenth: nothing to tell.
    assert len(length(31, 1, batch_size=8).notes) == 1
    assert "asks for 0.01 passes" in length(100, 1, epochs=0.01).notes[1]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (
            {"max_steps": 5, "warmup_steps": 5},
            "train.warmup_steps: is 5 and the run has 5 steps, so the warm-up would take all of "
            "it; set it below that, or train.warmup_steps=null for train.warmup_ratio",
        ),
        (
            {"early_stopping": {"patience": 2}, "num_validation": 0},
            "train.early_stopping: no row is held out beside the 100 training rows, so nothing "
            "could stop the run; set dataset.validation to a number of rows or a file, or "
            "train.early_stopping=null",
        ),
        (
            {"keep": "best", "num_validation": 0},
            "train.keep: is best, and no row is held out beside the 100 training rows to tell "
            "which step is the best; set dataset.validation to a number of rows or a file, or "
            "train.keep=last",
        ),
    ],
)
def test_what_cannot_work_is_a_fault(values, fault):
    assert length(**values).faults == (fault,)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"save_every": 26}, "train.save_every is 26 and the run has 25 steps"),
        ({"eval_every": 26}, "validated before the first step and at the end only"),
        ({"log_every": 26}, "metrics.jsonl gets its last step only"),
        ({"eval_every": 5, "num_validation": 0}, "no row is held out: nothing is validated"),
        ({"num_validation": 101}, "more rows are held out (101) than trained on (100)"),
        (
            {"max_steps": 20, "eval_every": 5, "early_stopping": {"patience": 4}},
            "train.early_stopping cannot stop this run before its 20 steps are done",
        ),
        (
            {"max_steps": 5, "keep": "best", "eval_every": 5},
            "train.keep is best and only the last of the 5 steps is validated",
        ),
        (
            {"scheduler": "constant", "warmup_steps": 3},
            "constant has no warm-up, so train.warmup_steps does nothing",
        ),
        (
            {
                "max_steps": 40,
                "scheduler": "warmup_stable_decay",
                "scheduler_args": {"num_stable_steps": 5, "num_decay_steps": 5},
                "warmup_steps": 5,
            },
            "25 of the 40 steps have a learning rate of 0 and train nothing",
        ),
        (
            {
                "max_steps": 10,
                "scheduler": "warmup_stable_decay",
                "scheduler_args": {"num_stable_steps": 50, "num_decay_steps": 5},
            },
            "the rate does not fall before the run ends",
        ),
    ],
)
def test_what_has_no_or_another_effect_is_told(values, note):
    notes = length(**values).notes[1:]
    assert len(notes) == 1
    assert note in notes[0]


def test_defaults_are_made_for_longer_runs_and_say_nothing_of_short_ones():
    found = length(max_steps=2, log_every=1)
    assert len(found.notes) == 1
    assert not found.warnings


def test_a_run_that_is_cut_short_knowingly_is_told_no_intervals():
    values = {"eval_every": 14, "save_every": 14, "log_every": 14}
    assert len(length(**values, max_steps=12).notes) == 1
    assert len(length(**values, batch_size=25, epochs=3).notes) == 4


@pytest.mark.parametrize(
    ("values", "code", "text"),
    [
        ({"learning_rate": 1e-12}, "few_steps", "The run has 25 steps, of which 0 can change a"),
        ({"max_steps": 1}, "few_steps", "The run has 1 step, of which 1 can change a weight."),
        (
            {
                "max_steps": 10,
                "scheduler": "warmup_stable_decay",
                "scheduler_args": {"num_decay_steps": 50},
                "warmup_steps": 0,
            },
            "warmup_too_long",
            "never reaches train.learning_rate in this run, only 0.0955 times it",
        ),
        (
            {"max_steps": 10, "warmup_ratio": 1.0},
            "warmup_too_long",
            "The rate rises in 9 of the 10 steps.",
        ),
    ],
)
def test_a_run_too_short_for_its_schedule_is_warned_of(values, code, text):
    found = length(**values)
    assert len(found.notes) == 1
    (warning,) = found.warnings
    assert (warning.kind, warning.code) == ("warning", code)
    assert text in warning.text
    assert warning.cure


def test_a_constant_rate_has_no_warm_up() -> None:
    train = TrainRecipe.model_validate({"scheduler": "constant", "warmup_ratio": 0.1})
    assert num_warmup_steps(train, 100) == 0
    warmed = train.model_copy(update={"scheduler": "constant_with_warmup"})
    assert num_warmup_steps(warmed, 100) == 10
