"""Whose a folder is: no file of the user's is replaced, and nothing strays into a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.runs.directory import RunDirectory


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(adapter={"rank": {"window": 8, "max": 4}}, train={"max_steps": 2})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.safetensors",
        "metrics.jsonl",
        "results.json",
        "recipe.yaml",
        "init/weights.pt",
        "checkpoints/best.pt",
        "run.json",
        "notes.txt",
        "compare.json",
    ],
)
@pytest.mark.parametrize(
    "words", [["train"], ["train", "--resume", "never"], ["init-only"], ["compare"]], ids=str
)
def test_a_folder_with_files_of_the_user_is_refused_and_left_alone(
    words: list[str], name: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words == ["compare"] and name == "compare.json":
        pytest.skip("that is how a comparison knows its own folder")
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    before = contents(tmp_path / "run")
    verb, *options = words
    assert cli.run([verb, str(recipe), *options]) == 2
    err = capsys.readouterr().err
    top = name.partition("/")[0]
    assert f"error: output_dir: {tmp_path / 'run'} holds {top}, which nothing of kpsvd-tune" in err
    assert "choose an empty folder or a new one" in err
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_a_recipe_in_its_own_output_dir_is_not_overwritten(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe.read_text()
    (tmp_path / "experiment").mkdir()
    own = recipe.rename(tmp_path / "experiment" / "recipe.yaml")
    assert cli.run(["train", str(own), f"output_dir={own.parent}"]) == 2
    assert f"such as {own.parent / 'new'}" in capsys.readouterr().err
    assert own.read_text() == text
    assert cli.run(["train", str(own), f"output_dir={own.parent / 'new'}"]) == 0


@pytest.mark.slow
def test_hidden_files_and_what_init_only_wrote_are_fine(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".gitignore").write_text("*\n")
    assert cli.run(["init-only", str(recipe)]) == 0
    assert cli.run(["init-only", str(recipe)]) == 0
    assert cli.run(["train", str(recipe)]) == 0
    assert (tmp_path / "run" / ".gitignore").read_text() == "*\n"


def test_a_file_in_the_way_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    assert cli.run(["train", str(recipe)]) == 2
    assert f"output_dir: {tmp_path / 'run'} is a file" in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_but_the_run_writes_into_a_run(
    recipe: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["train", str(recipe)]) == 0
    before = contents(run)
    score = ["eval", str(run), "--task", "gsm8k", "--path", str(rows_file)]
    for words, place in (
        ([*score, "--output", str(run)], run),
        ([*score, "--output", str(run / "adapter")], run / "adapter"),
        ([*score, "--output", str(run / "evaluation" / "mine")], run / "evaluation" / "mine"),
        (["merge", str(run / "adapter"), "--output", str(run / "merged")], None),
        (["train", str(recipe), f"output_dir={run / 'second'}"], run / "second"),
        (["init-only", str(recipe), f"output_dir={run / 'second'}"], run / "second"),
        (["compare", str(recipe)], run),
    ):
        capsys.readouterr()
        assert cli.run(words) == 2, words
        err = capsys.readouterr().err
        if place is not None:
            assert f": {place} " in err, err
            assert "into which only that run writes" in err
    assert contents(run) == before


@pytest.mark.slow
def test_an_evaluation_goes_into_a_folder_of_its_own(
    recipe: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    assert cli.run(["train", str(recipe)]) == 0
    mine.mkdir()
    score = ["eval", str(run), "--task", "gsm8k", "--path", str(rows_file), "--limit", "1"]
    score += ["--max-new-tokens", "2", "--output", str(mine)]
    for name in ("results.json", "evaluation.json", "points.json"):
        (mine / name).write_text('{"accuracy": 0.9}')
        assert cli.run(score) == 2
        assert f"{mine / name} is not of an evaluation" in capsys.readouterr().err
        (mine / name).unlink()
    (mine / "notes.json").write_text("{}")
    assert cli.run(score) == 2
    assert f"--output: {mine} holds notes.json" in capsys.readouterr().err
    (mine / "notes.json").unlink()
    assert cli.run(score) == 0
    assert (mine / "points.json").is_file()
    assert cli.run(score) == 0
    # The scores go into the run's results: when it ended stays, and a stopped run stays one.
    directory = RunDirectory(run)
    before = json.loads(directory.run_file.read_text())
    assert cli.run(score[:-2]) == 0
    assert json.loads(directory.run_file.read_text()) == before
    assert "gsm8k" in json.loads(directory.results_file.read_text())["scores"]
    directory.update(status="stopped")
    known = directory.results_file.read_bytes()
    capsys.readouterr()
    assert cli.run(score[:-2]) == 0
    assert "is stopped: the scores are not added to its results.json" in capsys.readouterr().err
    assert json.loads(directory.run_file.read_text())["status"] == "stopped"
    assert directory.results_file.read_bytes() == known


@pytest.mark.slow
def test_checkpoints_without_the_record_of_their_run_are_not_trained_over(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["train", str(recipe)]) == 0
    (run / "run.json").unlink()
    before = contents(run)
    assert cli.run(["train", str(recipe)]) == 1
    err = capsys.readouterr().err
    assert f"error: {run} holds checkpoints of a run and no run.json" in err
    assert "put that file back, or pass --resume never" in err
    assert contents(run) == before
    assert cli.run(["train", str(recipe), "--resume", "never"]) == 0
    assert len(list((run / "previous" / "001" / "checkpoints").iterdir())) > 0


@pytest.mark.slow
def test_a_run_that_was_set_aside_and_then_killed_begins_again(recipe: Path) -> None:
    assert cli.run(["train", str(recipe)]) == 0
    run = RunDirectory(recipe.parent / "run")
    run._set_aside()
    assert not run.run_file.exists()
    assert cli.run(["train", str(recipe)]) == 0


@pytest.mark.slow
def test_an_adapter_that_was_deleted_is_rebuilt_by_the_same_command(
    recipe: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["train", str(recipe)]) == 0
    score = ["eval", str(run), "--task", "gsm8k", "--path", str(rows_file), "--limit", "1"]
    assert cli.run([*score, "--max-new-tokens", "2"]) == 0
    scored = json.loads((run / "results.json").read_text())["scores"]
    before = contents(run)
    shutil.rmtree(run / "adapter")
    assert cli.run(["train", str(recipe)]) == 0
    after = contents(run)
    assert after["adapter/adapter_model.safetensors"] == before["adapter/adapter_model.safetensors"]
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert json.loads((run / "results.json").read_text())["scores"] == scored
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    capsys.readouterr()
    assert cli.run(["train", str(recipe)]) == 0
    err = capsys.readouterr().err
    assert "is finished; nothing was done. Its adapter is gone, and no checkpoint is left" in err
