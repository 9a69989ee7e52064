"""Whether a folder holds the trial that is to be run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kpsvd_tune.comparison.trial import _row, known_identity
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.comparison import Trial
from kpsvd_tune.report.results import TrainResult
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.storage.json_files import to_json


def identity(**changes: Any) -> dict[str, Any]:
    least = {"model": {"path": "-"}, "dataset": {"path": "-"}, "output_dir": "-"}
    recipe = Recipe.model_validate(least).model_dump(mode="json")
    adapter = recipe.pop("adapter")
    found = {"shared": {"recipe": recipe, "base": {"a": "1"}}, "method": "kpsvd"}
    return {**found, "adapter": adapter, "schedule": "now", **changes}


def run_with(folder: Path, held: dict[str, Any]) -> RunDirectory:
    (folder / "run.json").write_bytes(to_json({"status": "running", "identity": held}))
    return RunDirectory(folder)


def test_an_empty_folder_takes_the_trial(tmp_path: Path) -> None:
    assert known_identity(RunDirectory(tmp_path), identity()) == identity()


def test_a_trial_of_an_earlier_version_goes_on_under_the_identity_it_began_with(
    tmp_path: Path,
) -> None:
    held = identity()
    # A key that is gone since, at its default, and keys that the version did not have yet.
    held["adapter"]["rate_ratio"] = 1.0
    del held["adapter"]["rate"]
    del held["shared"]["recipe"]["train"]["on_oom"]
    assert known_identity(run_with(tmp_path, held), identity()) == held


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"method": "kpsvd-thin"},
        {"schedule": None},
        {"adapter": identity()["adapter"] | {"rate_ratio": 2.0}},
        {"adapter": identity()["adapter"] | {"init": "random"}},
        {"shared": {**identity()["shared"], "base": {"a": "2"}}},
    ],
)
def test_another_trial_is_none(held: dict[str, Any], tmp_path: Path) -> None:
    found = run_with(tmp_path, identity(**held) if held else {})
    assert known_identity(found, identity()) is None


def test_steps_without_a_finite_figure_are_left_out_of_it(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 2.0, "grad_norm": None, "tokens": 8, "tokens_per_second": 4.0},
        {"step": 2, "loss": None, "grad_norm": None, "tokens": 8, "tokens_per_second": 4.0},
        {"step": 3, "loss": 1.0, "grad_norm": 0.5, "tokens": 8, "tokens_per_second": 4.0},
    ]
    run = RunDirectory(tmp_path)
    run.metrics_file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    setup: Any = SimpleNamespace(trial=Trial("lora", 10, 1e-3, 0), base={"forgetting_loss": None})
    outcome = TrainResult(1.0, 1.5, 2.0, 3, 10, 6.0, 100, adapter_validation_loss=1.5)
    others = {"test_loss": None, "forgetting_loss": None}
    row = _row(setup, run, outcome, others, "1", 10, 0.0, None)
    assert (row.losses, row.grad_norms) == ((2.0, 1.0), (0.5,))
