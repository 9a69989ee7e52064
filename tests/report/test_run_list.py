"""The list of runs under a folder: what it finds, sorts and skips, and how it fits a console."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_folder import write_run
from trial_rows import row

from kpsvd_tune.commands import main as cli
from kpsvd_tune.comparison.verdict import compare_rows
from kpsvd_tune.errors import InputError
from kpsvd_tune.report.run_list import list_runs
from kpsvd_tune.storage.json_files import to_json
from kpsvd_tune.storage.locks import lock_folder

OLD = Path(__file__).parents[1] / "fixtures" / "0.1-before-house"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    write_run(folder / "good", loss=1.0, started="2026-01-02T00:00:00+0000")
    write_run(folder / "deep" / "er" / "better", loss=0.5, ended="2026-03-02T00:00:00+0000")
    write_run(folder / "cut", loss=0.7, finished=False, started="2026-02-02T00:00:00+0000")
    shutil.copytree(OLD / "initialised", folder / "init-only")
    broken = write_run(folder / "broken")
    (broken / "results.json").write_text('{"steps": ')
    # Neither is a run: another tool's, and what a run set aside.
    (folder / "other" / "checkpoints").mkdir(parents=True)
    shutil.copytree(folder / "good", folder / "good" / "previous" / "001")
    begun = folder / "compared"
    shutil.copytree(folder / "good", begun / "trials" / "lora-1")
    (begun / "compare.json").write_text("{}")
    return folder


def names(folder: Path, *arguments: Any, **options: Any) -> list[str]:
    return [each.name for each in list_runs(folder, *arguments, **options).runs]


def test_runs_are_found_at_any_depth_with_their_figures(folder: Path) -> None:
    found = list_runs(folder)
    lines = {each.name: each for each in found.runs}
    assert set(lines) == {"good", "deep/er/better", "cut", "init-only", "compared"}
    good = lines["good"]
    assert (good.state, good.steps, good.parameters, good.rank) == ("finished", 40, 120, "1-5")
    assert (good.form, good.model, good.time) == ("both", "models/tiny <model>", 20.0)
    assert good.loss_before == 3.0
    assert good.loss == pytest.approx(1.0366, abs=1e-4)
    assert (good.score, good.score_name, good.score_text) == (0.5, "exact_match", "50.0 %")
    # Of one that goes on, or was killed, the log tells.
    cut = lines["cut"]
    assert (cut.state, cut.steps, cut.time) == ("stopped", 40, 20.0)
    assert cut.loss == pytest.approx(0.7366, abs=1e-4)
    assert lines["init-only"].state == "initialised"
    assert (lines["compared"].kind, lines["compared"].state) == ("comparison", "begun")
    ((place, reason),) = found.skipped
    assert place == str(folder / "broken")
    assert "results.json is not JSON" in reason


def test_a_run_whose_folder_a_process_holds_is_running(folder: Path) -> None:
    with lock_folder(folder / "cut"):
        assert {e.name: e.state for e in list_runs(folder).runs}["cut"] == "running"
    (folder / "cut" / ".lock").write_text("process 1 on a host, killed")
    assert {e.name: e.state for e in list_runs(folder).runs}["cut"] == "stopped"


def test_they_are_sorted_and_those_without_the_figure_come_last(folder: Path) -> None:
    assert names(folder, "loss")[:3] == ["deep/er/better", "cut", "good"]
    assert names(folder, "loss", reverse=True)[:3] == ["good", "cut", "deep/er/better"]
    assert set(names(folder, "loss", reverse=True)[3:]) == {"init-only", "compared"}
    kept = [name for name in names(folder, "date") if name in ("good", "cut", "deep/er/better")]
    assert kept == ["deep/er/better", "cut", "good"]
    assert names(folder, "name") == sorted(names(folder))


def test_a_single_run_is_listed_under_its_name(folder: Path) -> None:
    assert names(folder / "good") == ["good"]


def test_a_folder_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"goop is no folder to look for runs in: nothing lies"):
        list_runs(folder / "goop")
    with pytest.raises(InputError, match="it is a file of rows"):
        list_runs(folder / "good" / "results.json")


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_fits_the_console(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    write_run(folder / ("long-" * 20 + "end"))
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.run(["runs", str(folder)]) == 0
    out = capsys.readouterr().out
    # Sentences break on a terminal, and stay whole elsewhere.
    told = ("skipped", "left out", "long names")
    table = [line for line in out.splitlines() if not line.startswith(told)]
    assert len(table) == 7
    assert all(len(line.rstrip()) <= width for line in table)
    for part in ("deep/er/better", "1.0366", "0.5366", "stopped", "…"):
        assert part in out
    assert "long-end" in out
    assert f"skipped {folder / 'broken'}: " in out


def test_json_has_all_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["runs", str(folder), "--sort", "loss", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in content["runs"]][0] == "deep/er/better"
    assert content["skipped"][0]["folder"] == str(folder / "broken")


def test_an_empty_folder_and_an_unknown_key_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["runs", str(tmp_path)]) == 0
    assert "no run and no comparison lies in" in capsys.readouterr().out
    assert cli.run(["runs", str(tmp_path), "--sort", "los"]) == 2
    error = capsys.readouterr().err
    assert "'--sort': 'los' is not one of 'date', 'name', 'state', 'model', 'loss'" in error


def test_a_comparison_shows_the_best_of_the_methods_with_the_most_seeds(tmp_path: Path) -> None:
    rows = [row("lucky", loss=0.5), *(row("lora", seed=seed, loss=1.0) for seed in range(3))]
    verdict = compare_rows(
        rows,
        model="tiny",
        steps=4,
        base={"validation_loss": 2.0},
        num_warmup=0,
        max_grad_norm=None,
    )
    (tmp_path / "compare.json").write_text("{}")
    (tmp_path / "comparison.json").write_bytes(to_json(verdict.to_dict()))
    (line,) = list_runs(tmp_path).runs
    assert (line.form, line.loss) == ("lora", 1.0)
