"""`restrain` in a run: the strength that is looked for, what is saved and said."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import CheckpointError
from kpsvd_tune.report.events import read_events
from kpsvd_tune.report.run_files import read_run_files
from kpsvd_tune.report.run_words import identity_lines
from kpsvd_tune.training.restrain import (
    FACTOR,
    HALVINGS,
    STRENGTHS,
    restrain,
    smallest_strength,
)

# Of letters whose loss the training of these tests raises, which depends on the random model.
TEXT = "".join(chr(ord("h") + number * number % 6) for number in range(3000))


@pytest.mark.parametrize("needed", [0.004, 0.02, 0.3, 1.0, 1.7, 40.0, 256.0])
def test_the_smallest_strength_is_found_within_a_step(needed: float) -> None:
    asked: list[float] = []

    def rise(strength: float) -> float:
        asked.append(strength)
        return 0.0 if strength >= needed else 1.0

    strength, is_met = smallest_strength(rise, 0.5)
    assert is_met
    assert needed <= strength
    assert strength <= max(STRENGTHS[0], needed * FACTOR ** (2**-HALVINGS) * (1 + 1e-9))
    assert len(asked) <= 10


def test_nothing_is_cut_back_where_nothing_was_forgotten() -> None:
    assert smallest_strength(lambda _: 0.01, 0.01) == (0.0, True)


@pytest.mark.parametrize(
    ("rises", "kept"),
    [
        (lambda strength: 0.2, 0.0),  # of equal ones the smallest
        (lambda strength: 0.2 + strength, 0.0),
        (lambda strength: 0.2 + abs(strength - 16), 16.0),
        (lambda strength: 3 - strength / 256, 256.0),
        (lambda strength: 2 + strength if strength else math.nan, 1.0),
        (lambda strength: math.nan, 0.0),
    ],
)
def test_where_no_strength_meets_the_limit_the_smallest_rise_is_kept(
    rises: Callable[[float], float], kept: float
) -> None:
    assert smallest_strength(rises, 0.01) == (kept, False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "kept.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def run(recipe: Path, folder: Path, *options: str) -> dict[str, Any]:
    assert cli.run(["train", str(recipe), f"output_dir={folder}", *options]) in (0, None)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


TRAIN = {"max_steps": 30, "learning_rate": 0.1, "eval_every": 0, "save_every": 10}


@pytest.mark.slow
@pytest.mark.parametrize("form", [["adapter.form=left", "adapter.factor_size=8"], []], ids=str)
def test_a_run_keeps_to_its_limit(
    form: list[str],
    tmp_path: Path,
    text: Path,
    write_recipe: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(train=TRAIN)
    free = run(recipe, tmp_path / "free", *form)
    loose = run(recipe, tmp_path / "loose", *form, f"restrain={{text: {text}, limit: 50}}")
    assert loose["restraint"]["strength"] == 0
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("free", "loose")]
    assert files[0].read_bytes() == files[1].read_bytes()
    before = loose["restraint"]["change_before"]
    assert before > 0.02  # so that there is something to cut back
    limit = before / 4
    cut = run(recipe, tmp_path / "cut", *form, f"restrain={{text: {text}, limit: {limit}}}")
    found = cut["restraint"]
    assert found["is_met"]
    assert found["strength"] > 0
    assert found["change"] == cut["text_loss_change"] <= limit
    assert found["change_before"] == pytest.approx(before, abs=1e-6)
    assert cut["validation_loss"] == free["validation_loss"]
    assert cut["adapter_validation_loss"] != free["adapter_validation_loss"]
    capfd.readouterr()
    assert cli.run(["report", str(tmp_path / "cut")]) == 0
    assert "rise of the loss on the text of restrain" in capfd.readouterr().out
    # What was saved is what was measured.
    task = ["--task", "forgetting", "--path", str(text), "--json"]
    assert cli.run(["eval", str(tmp_path / "cut"), *task]) == 0
    scores = json.loads(capfd.readouterr().out)["scores"]
    assert scores["loss_change"]["value"] < before / 2
    # Asked for later, it is done without training again.
    allowed = ["--allow-change", "restrain"]
    later = run(
        recipe, tmp_path / "free", *form, f"restrain={{text: {text}, limit: {limit}}}", *allowed
    )
    assert later["restraint"]["strength"] == found["strength"]
    weights = [
        load_file(tmp_path / each / "adapter/adapter_model.safetensors") for each in ("cut", "free")
    ]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_a_limit_that_cannot_be_kept_is_told(
    tmp_path: Path,
    text: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    worse = 1.0

    def never(rise: Callable[[float], float], _limit: float) -> tuple[float, bool]:
        return smallest_strength(lambda strength: rise(strength) + 100 + worse * strength, 0.01)

    monkeypatch.setattr("kpsvd_tune.training.restrain.smallest_strength", never)
    recipe = write_recipe(train=TRAIN | {"max_steps": 2})
    folder = tmp_path / "run"
    cli.run(["train", str(recipe), f"restrain={{text: {text}}}"])
    found = json.loads((folder / "results.json").read_text())
    assert (found["restraint"]["strength"], found["restraint"]["is_met"]) == (0, False)
    assert found["adapter_validation_loss"] == found["validation_loss"]
    change, stderr = found["text_loss_change"], found["restraint"]["stderr"]
    assert (
        "no strength up to 256 keeps to the limit 0.01; the update as it was trained (strength 0) "
        f"is kept, for its rise is the smallest: {change:+.4f} (standard error {stderr:.4f}). Allow"
    ) in " ".join(capfd.readouterr().err.split())
    worse = -0.01
    cli.run(["train", str(recipe), f"restrain={{text: {text}}}", f"output_dir={tmp_path / 'two'}"])
    said = " ".join(capfd.readouterr().err.split())
    assert "keeps to the limit 0.01; strength 256 is kept, for its rise is the smallest" in said


WHOLE = ["adapter.modules_to_save=[lm_head]"]
CUT = "`restrain` cuts the factors alone; what is learnt by lm_head stays as it is trained"


@pytest.mark.slow
def test_modules_that_cannot_be_cut_back_are_warned_of(
    text: Path, write_recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(train=TRAIN | {"max_steps": 1}))
    kept = f"restrain={{text: {text}}}"
    assert cli.run(["plan", recipe, *WHOLE, kept, "--without-rows"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert CUT in said
    assert "If the limit matters more than they do, leave adapter.modules_to_save out;" in said
    for options in (WHOLE, [kept]):
        assert cli.run(["plan", recipe, *options, "--without-rows"]) == 0
        assert "cuts the factors alone" not in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
def test_a_run_warns_of_modules_that_cannot_be_cut_back(
    tmp_path: Path,
    text: Path,
    write_recipe: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(train=TRAIN | {"max_steps": 1})
    kept = f"restrain={{text: {text}, limit: 50}}"
    run(recipe, tmp_path / "one", *WHOLE, kept)
    said = " ".join(capfd.readouterr().err.split())
    assert said.index(CUT) < said.index("training for 1 step")
    (told,) = (e for e in read_events(tmp_path / "one") if e.code == "unrestrained_modules")
    assert told.evidence == {"modules": "lm_head"}
    # An adapter that is gone on from brings its own, and its recipe names none.
    folder = tmp_path / "one/adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    config["trainable_token_indices"] = {"embed_tokens": [3, 5]}
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(config))
    (other / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()
    )
    assert cli.run(["plan", str(recipe), f"adapter={{from: {other}}}", kept]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "what is learnt by lm_head, rows of embed_tokens stays" in said
    assert "go on from an adapter without them (adapter.from)" in said


@pytest.mark.slow
def test_a_text_that_changed_is_a_change_of_the_run(
    tmp_path: Path,
    text: Path,
    write_recipe: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe, folder = write_recipe(train=TRAIN | {"max_steps": 10}), tmp_path / "run"
    kept = f"restrain={{text: {text}, limit: 50}}"
    first = run(recipe, folder, kept)
    record = json.loads((folder / "run.json").read_text())
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert record["identity"]["restrain.text.sha256"] == digest
    lines = identity_lines(read_run_files(folder))
    assert ("hash of the text of restrain", digest) in lines
    text.write_text(TEXT[::-1], encoding="utf-8")
    shutil.rmtree(folder / "adapter")  # which is to be built again, of another text
    capfd.readouterr()
    assert cli.run(["train", str(recipe), kept]) == CheckpointError.exit_code
    said = " ".join(capfd.readouterr().err.split())
    assert f"restrain.text.sha256: '{digest}' in the run, " in said
    assert "undo the change, or accept it with --allow-change restrain.text.sha256" in said
    assert not (folder / "adapter").exists()
    again = run(recipe, folder, kept, "--allow-change", "restrain.text")
    assert again["restraint"]["base_loss"] != first["restraint"]["base_loss"]
    now = json.loads((folder / "run.json").read_text())
    assert now["identity"]["restrain.text.sha256"] != digest
    assert [each["key"] for each in now["changes"]] == ["restrain.text.sha256"]
    # A run that was begun before there was the hash.
    del now["identity"]["restrain.text.sha256"]
    (folder / "run.json").write_text(json.dumps(now))
    shutil.rmtree(folder / "adapter")
    text.write_text(TEXT, encoding="utf-8")
    run(recipe, folder, kept)
    last = json.loads((folder / "run.json").read_text())
    assert last["identity"]["restrain.text.sha256"] == digest
    assert last["changes"] == now["changes"]


@pytest.mark.slow
def test_the_text_is_that_of_the_start(
    tmp_path: Path,
    text: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, kept = write_recipe(train=TRAIN | {"max_steps": 1}), f"restrain={{text: {text}}}"
    found = run(recipe, tmp_path / "one", kept)["restraint"]

    def later(*given: Any) -> Any:
        text.write_text("another text", encoding="utf-8")
        return restrain(*given)

    monkeypatch.setattr("kpsvd_tune.training.stages.restrain", later)
    assert run(recipe, tmp_path / "two", kept)["restraint"] == found


def test_a_text_too_short_is_refused_before_the_work(
    tmp_path: Path, write_recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.", encoding="utf-8")
    recipe = write_recipe(train=TRAIN)
    assert cli.run(["train", str(recipe), f"restrain={{text: {short}}}"]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "restrain.text" in said
    assert "expected more than 768" in said
    assert not (tmp_path / "run" / "init").exists()


def test_sharded_weights_are_refused(
    tmp_path: Path, text: Path, write_recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(train=TRAIN | {"parallel": "fsdp"})
    assert cli.run(["train", str(recipe), f"restrain={{text: {text}}}"]) == 2
    assert "restrain: an update is not cut back on sharded weights" in " ".join(
        capfd.readouterr().err.split()
    )
