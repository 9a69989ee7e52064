"""The init-only command: what it says, what it refuses, and what it leaves alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.decompose.spectra import Settings


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "# Purpose: a tiny test.\n"
        f"model: {{path: {tiny_model_dir}, dtype: float32}}\n"
        "adapter: {rank: {window: 8, max: 4}}\n"
        f"output_dir: {tmp_path / 'run'}\n",
        encoding="utf-8",
    )
    return path


@pytest.mark.slow
def test_init_only_names_the_page_and_leaves_a_training_run_alone(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["init-only", str(recipe)]) == 0
    assert f"open {run}/init/rank_report.html in a browser" in capsys.readouterr().err
    (run / "run.json").write_text('{"identity": {}}')
    before = (run / "init" / "rank_report.json").read_bytes()
    assert cli.run(["init-only", str(recipe), "adapter.rank.max=1"]) == 1
    assert "holds a training run, and its ranks stay as they are" in capsys.readouterr().err
    assert (run / "init" / "rank_report.json").read_bytes() == before


def test_init_only_without_plotly_says_how_to_get_the_page(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert cli.run(["init-only", str(recipe)]) == 0
    said = capsys.readouterr().err
    assert "pip install 'kpsvd-tune[report]'" in said
    assert "in a browser" not in said


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--sweep", "adapter.rank.energy=0.2,0.9"]])
def test_a_stopped_decomposition_says_that_nothing_is_lost(
    recipe: Path,
    more: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kpsvd_tune.decompose.collect.run_processes", stopped)
    assert cli.run(["init-only", str(recipe), "--processes", "2", *more]) == 130
    said = capsys.readouterr().err
    assert (
        "stopped by SIGINT while decomposing the base model; finished matrices are kept; the same "
        "command goes on from there"
    ) in said


@pytest.mark.parametrize("more", [[], ["--sweep", "adapter.rank.energy=0.2,0.9"]])
def test_more_gpus_than_there_are_is_refused(
    recipe: Path,
    more: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cli.run(["init-only", str(recipe), "--gpus", "3", *more]) == 2
    assert "--gpus 3: PyTorch sees 1 CUDA GPU here" in capsys.readouterr().err
    assert cli.run(["init-only", str(recipe), "--gpus", "1", "--processes", "2"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_gpus_decompose_in_one_worker_each(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def workers(source: object, tasks: object, settings: Settings, number: int, *_: object) -> None:
        asked.append((number, settings.device))
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("kpsvd_tune.decompose.collect.run_processes", workers)
    assert cli.run(["init-only", str(recipe), "--gpus", "2"]) == 130
    assert asked == [(2, "cuda")]


def test_a_sweep_that_changes_nothing_says_so(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["init-only", str(recipe), "adapter.rank.method=fixed"]
    assert cli.run([*sweep, "--sweep", "adapter.rank.energy=0.2,0.9"]) == 0
    assert "every value gives the same ranks: with method fixed" in capsys.readouterr().err


def test_gpus_where_there_are_none_are_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cli.run(["init-only", str(recipe), "--gpus", "1"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--gpus 1: PyTorch sees no CUDA GPUs here" in said


@pytest.mark.slow
def test_ranks_that_training_chooses_otherwise_are_noted(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init-only", str(recipe), "--sweep", "adapter.rank.energy=auto,0.9"]) == 0
    assert "auto is chosen by `train`; here the default stands in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("train.seed=1", "only keys of adapter.rank can be swept"),
        ("train.seed=1,2", "only keys of adapter.rank can be swept"),
        ("adapter.rank.tolerance=0,0.1", "one set of spectra has one tolerance"),
        ("adapter.rank.budget=10,20", "a budget of 10 parameters is below"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    recipe: Path, sweep: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init-only", str(recipe), "--sweep", sweep]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_one_impossible_value_of_a_sweep_is_shown_in_its_row(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["init-only", str(recipe), "--sweep", "adapter.rank.budget=10,1M"]
    assert cli.run(sweep) == 0
    out = capsys.readouterr().out
    assert re.search(r"budget=10 +impossible", out)
    assert "adapter.rank.budget=10: adapter.rank: a budget of 10 parameters is below" in out
    assert cli.run([*sweep, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "a budget of 10" in found["adapter.rank.budget=10"]["error"]
    assert len(found["adapter.rank.budget=1M"]["layers"]) == 14


def test_an_output_folder_that_is_a_file_is_refused_with_a_cure(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("in the way")
    assert cli.run(["init-only", str(recipe)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "run is a file; expected a folder, or a name that is free" in said


@pytest.mark.parametrize(
    ("option", "code", "said"),
    [
        ("adapter.modules_to_save=[lm_haed]", 2, "'lm_haed' matches no module; did you mean lm_"),
        ("adapter.exclude_modules=[up_porj]", 2, "'up_porj' matches no module; did you mean up_"),
        ("adapter.modules_to_save=[norm]", 0, "modules_to_save 'norm' means 5 modules, trained"),
    ],
)
def test_names_that_match_nothing_or_more_than_meant(
    option: str, code: int, said: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init-only", str(recipe), option]) == code
    output = capsys.readouterr()
    assert said in " ".join((output.out + output.err).split())
