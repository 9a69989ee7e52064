"""What a run leaves is sealed: one changed bit in adapter/, init/ or a checkpoint is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from kpsvd_tune.commands import main as cli
from kpsvd_tune.runs.identity import run_id

FACTORS = "init/factors.safetensors"


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        adapter={"rank": {"window": 4, "max": 2}},
        train={"max_steps": 4, "save_every": 2, "learning_rate": 1e-2},
    )


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Path:
    assert cli.run(["train", str(recipe)]) == 0
    return tmp_path / "run"


def flip(file: Path, place: int = -5) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def commands(adapter: Path, recipe: Path, tmp_path: Path) -> Iterator[list[str]]:
    """Every verb that reads an adapter."""
    rows = str(tmp_path / "rows.jsonl")
    yield ["merge", str(adapter), "--output", str(tmp_path / "merged")]
    yield ["generate", str(adapter), "Hello", "--max-new-tokens", "2", "--raw"]
    score = ["--task", "loss", "--path", rows, "--output", str(tmp_path / "scores")]
    columns = "columns={prompt: question, completion: answer}"
    yield ["eval", str(adapter), columns, *score]
    start = [f"adapter.from={adapter}", f"output_dir={tmp_path / 'next'}"]
    content = yaml.safe_load(recipe.read_text())
    del content["adapter"]
    other = recipe.with_name("next.yaml")
    other.write_text(yaml.safe_dump(content))
    yield ["train", str(other), *start]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"]
)
def test_one_flipped_bit_of_an_adapter_is_refused_by_every_verb(
    recipe: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(run / "adapter", copy)
    if name == "adapter_config.json":
        # Still JSON with the same types.
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace('"seed": 0', '"seed": 1'))
    else:
        flip(copy / name)
    for command in commands(copy, recipe, tmp_path):
        capsys.readouterr()
        assert cli.run(command) == 2, command
        err = " ".join(capsys.readouterr().err.split())
        assert f"{copy / name} is damaged: its sha256 is not the manifest's" in err
        assert "remove" in err
        assert "manifest.json" in err


@pytest.mark.slow
def test_a_whole_copy_and_one_without_a_seal_are_read(
    recipe: Path, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(run / "adapter", copy)
    merge, generate, *_ = commands(copy, recipe, tmp_path)
    assert cli.run(generate) == 0
    # The card is no part of it: it takes scores, and remarks.
    (copy / "README.md").write_text("mine")
    assert cli.run(merge) == 0
    (copy / "manifest.json").unlink()
    assert cli.run(generate) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["factors.safetensors", "rank_report.json"])
def test_one_flipped_bit_of_the_factors_is_refused(
    recipe: Path, run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.rmtree(run / "adapter")
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000004")
    file = run / "init" / name
    whole = file.read_bytes()
    if name == "rank_report.json":
        report = json.loads(whole)
        report["totals"]["energy"] += 0.01
        file.write_text(json.dumps(report))
    else:
        flip(file)
    capsys.readouterr()
    assert cli.run(["train", str(recipe)]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert f"{file} is damaged" in err
    assert "--resume never" in err
    file.write_bytes(whole)
    assert cli.run(["train", str(recipe)]) == 0


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_taken(
    recipe: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert cli.run(["train", str(recipe), f"output_dir={other}", "train.seed=7"]) == 0
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "results.json").unlink()
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    capfd.readouterr()
    assert cli.run(["train", str(recipe)]) == 1
    assert "step-000004 is of another run; was it copied here?" in capfd.readouterr().err
    one = run / "checkpoints" / "step-000002"
    assert cli.run(["train", str(recipe), "--resume", str(one)]) == 1
    assert "step-000002 is of another run" in capfd.readouterr().err


def test_what_changes_nothing_leaves_a_run_the_same() -> None:
    identity = {"recipe": {"output_dir": "a", "train": {"seed": 0, "log_every": 1}}, "base": {}}
    moved = {"recipe": {"output_dir": "b", "train": {"seed": 0, "log_every": 9}}, "base": {}}
    other = {"recipe": {"output_dir": "a", "train": {"seed": 1, "log_every": 1}}, "base": {}}
    assert run_id(identity) == run_id(moved) != run_id(other)


@pytest.mark.slow
def test_files_follow_the_umask(recipe: Path, tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        assert cli.run(["train", str(recipe)]) == 0
        merged = tmp_path / "merged"
        assert cli.run(["merge", str(tmp_path / "run"), "--output", str(merged)]) == 0
    finally:
        os.umask(mask)
    for folder in (tmp_path / "run", merged):
        for path in (folder, *folder.rglob("*")):
            if path.name == ".lock":
                continue
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
