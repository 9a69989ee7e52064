"""Modules that are trained whole count among what is trained, wherever that is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kpsvd_tune.commands import main as cli
from kpsvd_tune.report.run_files import read_run_files
from kpsvd_tune.report.run_list import list_runs
from kpsvd_tune.report.run_words import cards

HEAD = 259 * 32


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
def test_plan_reports_and_cards_count_a_head_that_is_trained_whole(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        adapter={"rank": {"method": "fixed", "max": 2}, "modules_to_save": ["lm_head"]},
        train={"max_steps": 1},
    )
    run, second = tmp_path / "run", tmp_path / "second"
    assert cli.run(["train", str(recipe)]) == 0
    trained = read(run / "results.json")["trainable_parameters"]
    capsys.readouterr()
    assert cli.run(["plan", str(recipe), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["adapter"]
    assert plan["trainable_parameters"] == [trained, trained]
    file = run / "adapter" / "adapter_model.safetensors"
    assert plan["file_bytes"][1] == pytest.approx(file.stat().st_size, rel=0.05)
    assert [each["name"] if isinstance(each, dict) else each[0] for each in plan["untouched"]] == [
        "model.embed_tokens"
    ]

    assert cli.run(["train", str(recipe), f"adapter={{from: {run}}}", f"output_dir={second}"]) == 0
    for folder in (run, second):
        report = read(folder / "init" / "rank_report.json")
        assert report["trained_whole"] == {"lm_head": HEAD}
        assert report["totals"]["trainable_parameters"] + HEAD == trained
        assert [each["name"] for each in report["untouched"]] == ["model.embed_tokens"]
        files = read_run_files(folder)
        assert files.ranks is not None
        assert files.ranks.trained_parameters == trained
        titles = {each["title"].partition(",")[0]: each["value"] for each in cards(files)}
        assert titles["trainable parameters"] == f"{trained:,}"
        card = (folder / "adapter" / "README.md").read_text()
        assert f"{HEAD:,} more of lm_head, trained whole" in card
    stored = sum(each.numel() for each in load_file(file).values() if each.is_floating_point())
    assert read(run / "init" / "rank_report.json")["totals"]["stored_parameters"] + HEAD == stored
    (run / "results.json").unlink()
    listed = {each.name: each.parameters for each in list_runs(tmp_path).runs}
    assert listed == {"run": trained, "second": trained}
    capsys.readouterr()
    assert cli.run(["report", str(second)]) == 0
    told = capsys.readouterr().out
    assert f"{HEAD:,} more parameters are trained whole" in told
    assert "1 weight matrix left alone" in told


def test_a_head_that_is_trained_in_16_bits_is_warned_of(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter={"modules_to_save": ["lm_head"]})
    said = "The modules of adapter.modules_to_save are trained in the base's bfloat16"
    assert cli.run(["plan", str(recipe), "model.dtype=bfloat16", "train.precision=bf16"]) == 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert cli.run(["plan", str(recipe), "model.dtype=float32"]) == 0
    assert said not in " ".join(capsys.readouterr().err.split())


def test_a_head_is_not_trained_in_float16(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter={"modules_to_save": ["lm_head"]}, model={"dtype": "float16"})
    for command in ("plan", "train"):
        assert cli.run([command, str(recipe)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "adapter.modules_to_save: lm_head would be trained in the float16 of the" in said
        assert "expected model.dtype: float32 or bfloat16 where modules are trained whole" in said
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
def test_the_head_of_an_adapter_that_is_trained_on_is_looked_at_as_well(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        adapter={"rank": {"method": "fixed", "max": 1}, "modules_to_save": ["lm_head"]},
        train={"max_steps": 1},
    )
    assert cli.run(["train", str(recipe)]) == 0
    on = ["plan", str(recipe), f"adapter={{from: {tmp_path / 'run'}}}", f"output_dir={tmp_path}/on"]
    capsys.readouterr()
    assert cli.run([*on, "model.dtype=bfloat16"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "are trained in the base's bfloat16" in said
    assert cli.run([*on, "model.dtype=float16"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "lm_head would be trained in the float16 of the base" in said
