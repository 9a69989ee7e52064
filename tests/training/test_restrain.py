"""`restrain` in a run: the strength that is looked for, what is saved and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kpsvd_tune.commands import main as cli
from kpsvd_tune.training.restrain import FACTOR, HALVINGS, STRENGTHS, smallest_strength

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


def test_a_limit_that_no_strength_meets_is_said() -> None:
    assert smallest_strength(lambda _: 0.2, 0.01) == (STRENGTHS[1], False)


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
    text: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def never(rise: Callable[[float], float], _limit: float) -> tuple[float, bool]:
        return smallest_strength(lambda strength: rise(strength) + 100, 0.01)

    monkeypatch.setattr("kpsvd_tune.training.restrain.smallest_strength", never)
    recipe = write_recipe(train=TRAIN | {"max_steps": 2})
    cli.run(["train", str(recipe), f"restrain={{text: {text}}}"])
    said = " ".join(capfd.readouterr().err.split())
    assert "no strength up to 256 keeps to the limit 0.01; the last one is kept" in said


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
