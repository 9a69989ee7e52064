"""Folders of other commands, of other runs and behind links, as the output of a command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kpsvd_tune.commands import main as cli

Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path, write_recipe: Callable[..., Path]) -> Train:
    """Train a run of some name and seed; gives its folder."""
    recipe = write_recipe(adapter={"rank": {"window": 8, "max": 4}}, train={"max_steps": 2})

    def run(name: str = "run", *words: str, code: int = 0) -> Path:
        folder = tmp_path / name
        assert cli.run(["train", str(recipe), f"output_dir={folder}", *words]) == code
        return folder

    return run


@pytest.mark.slow
def test_the_adapter_of_another_run_does_not_count_as_the_runs_own(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = train(), train("other", "train.seed=5")
    own = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    shutil.copytree(other / "adapter", run / "adapter")
    capsys.readouterr()
    train("run", code=2)
    said = f"error: {run / 'adapter'} holds another adapter than its run has saved"
    assert said in capsys.readouterr().err
    assert cli.run(["generate", str(run), "hello", "--max-new-tokens", "1"]) == 2
    assert said in capsys.readouterr().err
    # As the message advises; the other's adapter is used by its own path.
    (run / "adapter").rename(run.parent / "theirs")
    assert cli.run(["generate", str(run.parent / "theirs"), "hi", "--max-new-tokens", "1"]) == 0
    train()
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == own
    # Runs of older versions have no such hash.
    facts = json.loads((run / "run.json").read_text())
    del facts["adapter_sha256"]
    (run / "run.json").write_text(json.dumps(facts))
    train()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "adapter_config.json"])
def test_a_file_of_the_adapter_that_was_swapped_is_named_by_every_command(
    train: Train, rows_file: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train()
    file = run / "adapter" / name
    file.write_text(file.read_text() + "\n")
    score = ["eval", str(run), "--task", "gsm8k", "--path", str(rows_file), "--limit", "1"]
    for words in (score, [*score, "--base-only"], ["train", str(run / "recipe.yaml")]):
        capsys.readouterr()
        assert cli.run(words) == 2, words
        assert f"{file} is damaged" in capsys.readouterr().err


def test_folders_of_other_commands_are_called_what_they_are(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    for name, content, what in (
        ("compare.json", '{"shared": {}}', "the folder of a comparison"),
        ("merge_report.json", '{"max_logit_difference": 0}', "a merged model"),
        ("adapter_config.json", '{"factor_shape": "thin"}', "the folder of an adapter"),
        ("results.json", '{"task": "loss", "conditions": ""}', "a folder that `eval` wrote"),
    ):
        place.mkdir()
        (place / name).write_text(content)
        train("place", code=2)
        err = capsys.readouterr().err
        assert f"output_dir: {place} is {what}, and nothing else is written into it" in err
        assert f"such as {place}-new" in err
        shutil.rmtree(place)


@pytest.mark.slow
def test_what_a_link_names_is_decided_at_the_start(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = train()
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    train("link", code=2)
    assert (
        f"output_dir: {link} is a link to {target}, where nothing lies" in capsys.readouterr().err
    )
    for is_there in (True, False):
        if is_there:
            target.mkdir()
        assert cli.run(["merge", str(run), "--output", str(link), "--dtype", "float32"]) == 0
        assert link.is_symlink()
        assert (target / "model.safetensors").is_file()
        shutil.rmtree(target)
    target.mkdir()
    monkeypatch.chdir(target)
    capsys.readouterr()
    assert cli.run(["merge", str(run), "--output", "."]) == 2
    assert "--output . is the folder that the command runs in" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert cli.run(["merge", str(run), "--output", str(loop)]) == 2
    assert f"--output {loop} is a link that leads nowhere" in capsys.readouterr().err
    train("loop", code=2)
    assert f"output_dir: {loop} is a link to {loop}, where nothing lies" in capsys.readouterr().err
    train("link")
    assert os.path.isfile(target / "results.json")


@pytest.mark.slow
def test_a_moved_run_says_where_its_base_was_looked_for(
    train: Train, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "here" / "models").mkdir(parents=True)
    shutil.copytree(tiny_model_dir, tmp_path / "here" / "models" / "base")
    monkeypatch.chdir(tmp_path / "here")
    run = train("run", "model.path=models/base")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    ask = ["generate", str(run), "hi", "--max-new-tokens", "1", "--offline"]
    assert cli.run(ask) == 2
    err = capsys.readouterr().err
    assert f"the base models/base which {run} names" in err
    assert f"looked for from {tmp_path}" in err
    assert f"It was {tmp_path / 'here' / 'models' / 'base'} when the adapter was saved" in err
    assert cli.run([*ask, "--base", str(tmp_path / "here" / "models" / "base")]) == 0
