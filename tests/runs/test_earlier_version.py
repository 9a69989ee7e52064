"""What version 0.1 left before the package was rearranged is still read, and gone on from.

The files lie in tests/fixtures/0.1-before-house: a finished run, one that was killed after its
checkpoint of step 4 of 6, a folder of init-only, and the spectra cache of the three.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kpsvd_tune.commands import main as cli

WRITTEN = Path(__file__).parents[1] / "fixtures" / "0.1-before-house"


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as the current folder and with their cache."""
    folder = tmp_path / "earlier"
    shutil.copytree(WRITTEN, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return folder


def test_a_killed_run_goes_on_from_its_checkpoint(earlier: Path) -> None:
    assert cli.run(["train", "recipe.yaml", "output_dir=unfinished"]) == 0
    lines = [json.loads(x) for x in (earlier / "unfinished/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    record = json.loads((earlier / "unfinished/run.json").read_text())
    assert record["status"] == "finished"
    assert record["id"] == json.loads((WRITTEN / "unfinished/run.json").read_text())["id"]
    assert record["changes"] == []
    name = "adapter/adapter_model.safetensors"
    resumed, whole = (
        load_file(earlier / "unfinished" / name),
        load_file(WRITTEN / "finished" / name),
    )
    # Close and no more, as the file was written on another machine.
    for name in (name for name in whole if name.endswith("kpsvd_base")):
        # Newer adapters say more of their base, above the kinds of the sketches.
        resumed[name][:, 0] &= 0xFF
        whole[name][:, 0] &= 0xFF
        # Norms of ones no longer make the rest of a float32 base a mixture of dtypes.
        assert (int(resumed[name][1, 0]), int(whole[name][1, 0])) == (1, 5)
        whole[name][1, 0] = 1
    torch.testing.assert_close(resumed, whole, rtol=1e-4, atol=1e-6)


def test_a_finished_run_stays_finished(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (earlier / "finished/results.json").read_bytes()
    assert cli.run(["train", "recipe.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before)
    assert cli.run(["report", "finished"]) == 0
    assert "7 matrices" in capsys.readouterr().out
    assert (earlier / "finished/results.json").read_bytes() == before


@pytest.mark.slow
def test_an_adapter_is_merged_and_scored(earlier: Path) -> None:
    assert cli.run(["merge", "finished", "--output", "merged"]) == 0
    columns = "columns={prompt: question, completion: answer}"
    scoring = ["eval", "finished", "--task", "loss", "--path", "rows.jsonl", columns]
    assert cli.run([*scoring, "--output", "scores"]) == 0


@pytest.mark.slow
def test_a_training_begins_with_an_adapter(earlier: Path) -> None:
    recipe = (earlier / "recipe.yaml").read_text()
    assert "\nadapter: {rank: {window: 4, max: 2}}\n" in recipe
    text = recipe.replace("{rank: {window: 4, max: 2}}", "{from: finished/adapter}")
    (earlier / "next.yaml").write_text(text)
    assert cli.run(["train", "next.yaml", "output_dir=next"]) == 0


@pytest.mark.slow
def test_ranks_come_from_the_spectra_cache(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decomposed although the cache holds it")

    monkeypatch.setattr("kpsvd_tune.linalg.plan.kpsvd", refuse)
    before = json.loads((WRITTEN / "initialised/init/rank_report.json").read_text())
    assert cli.run(["init-only", "recipe.yaml", "output_dir=initialised"]) == 0
    after = json.loads((earlier / "initialised/init/rank_report.json").read_text())
    keys = ("name", "rank", "factor_shape", "singular_values")
    assert [[each[key] for key in keys] for each in after["layers"]] == [
        [each[key] for key in keys] for each in before["layers"]
    ]
    # A run goes on in a folder that init-only made.
    assert cli.run(["train", "recipe.yaml", "output_dir=initialised"]) == 0
