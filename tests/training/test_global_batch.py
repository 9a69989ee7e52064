"""A run goes on with another number of processes, and each step keeps its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import CheckpointError
from kpsvd_tune.launch import launch
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.training.global_batch import Fitted, fit_global_batch

ALLOW = ("num_processes",)


def recipe(batch_size: int = 4, gradient_accumulation: int = 1) -> Recipe:
    sizes = {"batch_size": batch_size, "gradient_accumulation": gradient_accumulation}
    least = {"model": {"path": "-"}, "dataset": {"path": "-"}, "output_dir": "-"}
    return Recipe.model_validate(least | {"train": sizes})


def record(
    batch_size: int, accumulation: int, processes: int, *earlier: dict[str, Any]
) -> dict[str, Any]:
    train = {"batch_size": batch_size, "gradient_accumulation": accumulation}
    return {
        "identity": {"recipe": {"train": train}, "num_processes": processes},
        "changes": list(earlier),
    }


def sizes(fitted: Fitted) -> tuple[int, int]:
    return fitted.recipe.train.batch_size, fitted.recipe.train.gradient_accumulation


@pytest.mark.parametrize(
    ("old", "typed", "processes", "expected"),
    [
        ((4, 1, 2), (4, 1), 1, (4, 2)),
        ((4, 1, 1), (4, 1), 2, (2, 1)),
        ((4, 2, 1), (4, 2), 2, (4, 1)),
        ((4, 1, 6), (4, 1), 8, (3, 1)),
        ((4, 1, 3), (2, 1), 2, (2, 3)),  # a process has less memory than before
        ((4, 1, 2), (2, 4), 1, (2, 4)),  # typed so that it fits
        ((1, 5, 2), (1, 5), 5, (1, 2)),
    ],
)
def test_a_step_keeps_its_rows(old, typed, processes, expected):
    fitted = fit_global_batch(recipe(*typed), record(*old), processes, ALLOW)
    assert sizes(fitted) == expected
    assert expected[0] * expected[1] * processes == old[0] * old[1] * old[2]
    assert fitted.accepted == ("train.batch_size", "train.gradient_accumulation")
    assert fitted.note is not None
    assert fitted.note.startswith(f"going on with {processes} process")
    assert "not byte for byte" in fitted.note
    assert "drawn anew" in fitted.note


def test_rows_that_cannot_be_shared_are_refused_with_what_to_set():
    with pytest.raises(CheckpointError) as caught:
        fit_global_batch(recipe(3, 2), record(3, 2, 2), 5, ALLOW)
    message = str(caught.value)
    assert message.startswith("a step of this run takes 12 rows, which 5 processes cannot share")
    assert "one of 1, 2, 3, 4, 6, 12 processes" in message
    assert "--allow-change train.batch_size --allow-change train.gradient_accumulation" in message


def test_other_rows_are_taken_where_they_are_asked_for():
    allowed = (*ALLOW, "train.batch_size")
    fitted = fit_global_batch(recipe(5, 1), record(4, 1, 2), 3, allowed)
    assert sizes(fitted) == (5, 1)
    assert fitted.accepted == ()
    assert fitted.note is not None
    assert fitted.note.startswith("a step takes 15 rows from here on, and took 8: the place")
    assert "rows in between are left out of this pass" in fitted.note


def test_other_rows_on_as_many_processes_move_the_place_in_the_data():
    for allowed in (("train.gradient_accumulation",), ("train",)):
        fitted = fit_global_batch(recipe(4, 1), record(4, 2, 1), 1, allowed)
        assert (sizes(fitted), fitted.accepted) == ((4, 1), ())
        assert fitted.note is not None
        assert "takes 4 rows from here on, and took 8" in fitted.note
        assert "rows that were seen come again in this pass" in fitted.note
        assert "as if every step had taken 4" in fitted.note
    # The same rows by another way stay where they are; what is not allowed is refused elsewhere.
    assert fit_global_batch(recipe(2, 4), record(4, 2, 1), 1, ("train",)).note is None
    assert fit_global_batch(recipe(4, 1), record(4, 2, 1), 1, ("train.seed",)).note is None


def test_nothing_is_fitted_without_another_number_that_is_allowed():
    for allowed, processes in (((), 1), (ALLOW, 2), ((), 2)):
        fitted = fit_global_batch(recipe(8, 3), record(4, 1, 2), processes, allowed)
        assert (sizes(fitted), fitted.accepted, fitted.note) == ((8, 3), (), None)
    assert fit_global_batch(recipe(), {"identity": {}}, 2, ALLOW).note is None
    unknown = {"identity": {"num_processes": 2}}
    assert fit_global_batch(recipe(), unknown, 1, ALLOW).note is None


def test_the_same_command_goes_on_after_a_change():
    earlier = {"key": "num_processes", "old": 2, "new": 1}
    fitted = fit_global_batch(recipe(4, 1), record(4, 2, 1, earlier), 1, ())
    assert sizes(fitted) == (4, 2)
    assert fitted.note is not None
    assert "a step still takes its 8 rows" in fitted.note
    known = fit_global_batch(recipe(4, 2), record(4, 2, 1, earlier), 1, ())
    assert (sizes(known), known.note) == ((4, 2), None)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_two_and_one_process_learn_as_one(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    warm_ranks: None,
    parallel: str,
) -> None:
    path = write_recipe(
        adapter={"rank": {"window": 8, "max": 4}},
        train={
            "max_steps": 6,
            "eval_every": 3,
            "save_every": 2,
            "keep_checkpoints": 9,
            "learning_rate": 1e-2,
            "parallel": parallel,
        },
    )
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    arguments = ["train", str(path), f"output_dir={moved}"]
    assert cli.run(["train", str(path), f"output_dir={whole}"]) == 0
    assert cli.run(arguments) == 0
    capfd.readouterr()

    # Back to the second step, on two processes, and then to the fourth of those, on one.
    two = [*arguments, "--resume", str(moved / "checkpoints" / "step-000002"), "--processes", "2"]
    assert launch(two, 2, use_cpu=True) == CheckpointError.exit_code
    err = capfd.readouterr().err
    assert "num_processes: 1 in the run, 2 now" in err
    assert "With num_processes accepted a step keeps its rows" in err
    assert launch([*two, "--allow-change", "num_processes"], 2, use_cpu=True) == 0
    err = capfd.readouterr().err
    assert "going on with 2 processes in place of 1: a step takes the same 2 rows" in err
    fourth = ["--resume", str(moved / "checkpoints" / "step-000004")]
    assert cli.run([*arguments, *fourth, "--allow-change", "num_processes"]) == 0

    for one, other in zip(lines(whole), lines(moved), strict=True):
        for key in ("step", "epoch", "tokens", "learning_rate"):
            assert one[key] == other[key]
        assert one.keys() == other.keys()
        for key in {"loss", "grad_norm", "validation_loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, moved)]
    for name, value in weights[0].items():
        assert weights[1][name].numpy() == pytest.approx(value.numpy(), abs=1e-5), name
    changes = json.loads((moved / "run.json").read_text())["changes"]
    found = [(each["key"], each["step"], each["old"], each["new"]) for each in changes]
    assert ("num_processes", 2, 1, 2) in found
    assert ("num_processes", 4, 2, 1) in found
    assert ("train.batch_size", 2, 2, 1) in found
    assert all("not byte for byte" in c["note"] for c in changes if c["key"] == "num_processes")
    assert cli.run(["report", str(moved)]) == 0
    page = (moved / "report.html").read_text()
    assert "num_processes: 2 → 1 (not byte for byte the run it would have been" in page
    capfd.readouterr()
    # Typed again it is finished: nothing has to be allowed any more.
    assert cli.run(arguments) == 0
    assert "is finished; nothing was done" in capfd.readouterr().err
