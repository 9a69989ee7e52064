"""A run of each adapter form: trained, stopped and resumed, gone on from, merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kpsvd_tune.commands import main as cli

FORMS = {
    "left": ["adapter.form=left", "adapter.factor_size=8"],
    "right, from a seed": [
        "adapter.form=right",
        "adapter.factor_size=[4, 8]",
        "adapter.init=random",
    ],
    "core": ["adapter.form=core"],
    "core, from a seed": ["adapter.form=core", "adapter.init=random"],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_a_run_resumes_goes_on_and_merges(
    options: list[str], tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(
        train={"max_steps": 6, "save_every": 2, "eval_every": 3, "learning_rate": 1e-2},
    )
    runs = [tmp_path / name for name in ("whole", "stopped", "further", "merged")]
    options = [*options, "adapter.rank={window: 8, max: 2}"]

    def train(run: Path, *more: str) -> None:
        assert cli.run(["train", str(recipe), *options, f"output_dir={run}", *more]) == 0

    train(runs[0])
    train(runs[1], "train.max_steps=4", "train.scheduler=constant", "train.warmup_ratio=0")
    train(
        runs[1],
        *("train.max_steps=6", "train.scheduler=constant", "train.warmup_ratio=0"),
        *("--allow-change", "train.max_steps"),
    )
    constant = tmp_path / "constant"
    train(constant, "train.scheduler=constant", "train.warmup_ratio=0")
    weights = [run / "adapter" / "adapter_model.safetensors" for run in (constant, runs[1])]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    ranks = json.loads((runs[0] / "init" / "rank_report.json").read_text())
    stored = sum(
        tensor.numel() for key, tensor in load_file(weights[0]).items() if "kpsvd_base" not in key
    )
    assert ranks["totals"]["stored_parameters"] == stored
    assert ranks["form"] == options[0].partition("=")[2]
    further = [str(recipe), f"adapter.from={runs[0]}", f"output_dir={runs[2]}"]
    assert cli.run(["train", *further]) == 0
    results = [json.loads((run / "results.json").read_text()) for run in (runs[0], runs[2])]
    assert results[1]["validation_loss_before"] == pytest.approx(
        results[0]["adapter_validation_loss"], abs=1e-6
    )
    again = json.loads((runs[2] / "init" / "rank_report.json").read_text())
    for key in ("trainable_parameters", "stored_parameters"):
        assert again["totals"][key] == ranks["totals"][key]
    assert cli.run(["merge", str(runs[0]), "--output", str(runs[3])]) == 0


@pytest.mark.slow
def test_a_run_that_goes_on_with_another_seed_keeps_its_drawn_factors(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(train={"save_every": 2, "learning_rate": 1e-2, "keep": "last"})
    run = tmp_path / "run"
    options = ["adapter.form=core", "adapter.init=random", "adapter.rank={window: 8, max: 2}"]
    assert cli.run(["train", str(recipe), *options, "train.max_steps=2"]) == 0
    allowed = [f"--allow-change={key}" for key in ("train", "dataset")]
    more = ["train.max_steps=4", "train.seed=1", *allowed]
    # Whether so few steps on other rows help is not asked here.
    cli.run(["train", str(recipe), *options, *more])
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["frozen_seed"] == 0
    assert json.loads((run / "results.json").read_text())["adapter_step"] == 4
