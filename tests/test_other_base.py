"""--base and --allow-other-base: a base that moved, and one that is another, said in the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.commands import main as cli

COLUMNS = "columns={prompt: question, completion: answer}"


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path, write_recipe: Callable[..., Path]) -> Path:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    return write_recipe(model={"path": str(base)}, train={"max_steps": 4, "learning_rate": 1e-2})


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Path:
    assert cli.run(["train", str(recipe), "adapter.rank={window: 4, max: 2}"]) == 0
    return tmp_path / "run"


@pytest.mark.slow
def test_a_base_that_moved_is_given_by_base(
    run: Path, tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    options = ["--base", str(moved)]
    score = ["--task", "loss", "--path", str(rows_file), "--output", str(tmp_path / "scores")]
    assert cli.run(["generate", str(run), "Hello", "--max-new-tokens", "2"]) == 2
    assert cli.run(["generate", str(run), "Hello", "--max-new-tokens", "2", *options]) == 0
    assert cli.run(["eval", str(run / "adapter"), COLUMNS, *score, *options]) == 0
    capsys.readouterr()
    assert cli.run(["generate", str(moved), "Hello", *options]) == 2
    assert "is no adapter, so it has no base model" in capsys.readouterr().err


@pytest.mark.slow
def test_another_base_is_refused_or_told(
    recipe: Path,
    run: Path,
    tmp_path: Path,
    rows_file: Path,
    model_factory: Any,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    model_factory(seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    base, allow = ["--base", str(other)], ["--allow-other-base"]
    merged, scores, second = (tmp_path / name for name in ("merged", "scores", "second"))
    score = ["--task", "loss", "--path", str(rows_file), "--output", str(scores)]
    start = [f"adapter.from={run}", f"model.path={other}", f"output_dir={second}"]
    commands = [
        ["merge", str(run), "--output", str(merged), *base],
        ["generate", str(run), "Hello", "--max-new-tokens", "2", *base],
        ["eval", str(run / "adapter"), COLUMNS, *score, *base],
        ["train", str(recipe), *start],
    ]
    for command in commands:
        capsys.readouterr()
        assert cli.run(command) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert "this adapter was trained on another base model" in err
        assert "pass --allow-other-base" in err
        capsys.readouterr()
        assert cli.run([*command, *allow]) in (0, 4)
        told = " ".join("".join(capsys.readouterr()).split())
        assert "on another base model (--allow-other-base)" in told
    report = json.loads((merged / "merge_report.json").read_text())
    assert report["warnings"][0].startswith("merged on another base model (--allow-other-base)")
    assert "on another base model" in (merged / "README.md").read_text()
    assert (
        "scored on another base" in json.loads((scores / "results.json").read_text())["other_base"]
    )
    results = json.loads((second / "results.json").read_text())
    assert results["other_base"].startswith("trained on another base model")
    assert "trained on another base model" in (second / "adapter" / "README.md").read_text()
    # What was trained there belongs to the other base from now on.
    assert cli.run(["generate", str(second), "Hello", "--max-new-tokens", "2"]) == 0
