"""`auto` becomes what the machine computes fast, and stays what a run began with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import (  # type: ignore[import-untyped]
    AcceleratorState,
    GradientState,
    PartialState,
)

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import RecipeError
from kpsvd_tune.hardware.bf16 import Bf16
from kpsvd_tune.recipe import Recipe, TrainRecipe
from kpsvd_tune.training import make_accelerator, precision
from kpsvd_tune.training.precision import settle_precision

CPU = torch.device("cpu")
FAST = Bf16(True, "bfloat16 was 6.9 x as fast as float32 on this CPU (planted)", 6.9)
SLOW = Bf16(False, "this CPU (planted) has no units for bfloat16")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first precision of a process, which other tests must not find."""

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    yield
    reset()


def recipe(asked: str, dtype: str) -> Recipe:
    content = {
        "model": {"path": "m", "dtype": dtype},
        "train": {"precision": asked},
        "output_dir": "x",
    }
    return Recipe.model_validate(content)


def settled(found: Recipe) -> tuple[str, str]:
    return found.train.precision, found.model.dtype


@pytest.mark.parametrize(
    ("asked", "dtype", "speed", "wanted"),
    [
        ("auto", "auto", FAST, ("bf16", "bfloat16")),
        ("auto", "auto", SLOW, ("no", "float32")),
        ("auto", "bfloat16", SLOW, ("no", "bfloat16")),
        ("auto", "float32", FAST, ("bf16", "float32")),
        ("bf16", "auto", None, ("bf16", "bfloat16")),
        ("fp16", "auto", None, ("fp16", "float16")),
        ("no", "auto", None, ("no", "float32")),
    ],
)
def test_auto_is_what_the_machine_multiplies(
    asked: str,
    dtype: str,
    speed: Bf16 | None,
    wanted: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Where the precision is given, nothing is measured.
    monkeypatch.setattr(precision, "bf16_speed", speed and (lambda _: speed))
    found = settle_precision(recipe(asked, dtype), CPU)
    assert settled(found.recipe) == wanted
    assert found.about is not None
    assert found.about["ratio"] == (speed.ratio if speed else None)
    assert found.note is not None
    said = speed.why if speed else f"it follows train.precision: {asked}"
    assert found.note.endswith(f"chosen for auto: {said}")


def test_given_values_stay_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speed", None)
    found = settle_precision(recipe("bf16", "float32"), CPU)
    assert (found.recipe, found.note) == (recipe("bf16", "float32"), None)


@pytest.mark.parametrize(("speed", "is_other"), [(SLOW, True), (FAST, False)])
def test_a_run_that_goes_on_keeps_what_it_began_with(
    speed: Bf16, is_other: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bf16_speed", lambda _: speed)
    before = {"train": {"precision": "bf16"}, "model": {"dtype": "bfloat16"}}
    found = settle_precision(recipe("auto", "auto"), CPU, {"identity": {"recipe": before}})
    assert settled(found.recipe) == ("bf16", "bfloat16")
    assert found.about is None, "run.json keeps what it says of the first choice"
    assert found.note is not None
    assert "train.precision: bf16 and model.dtype: bfloat16 were chosen for auto" in found.note
    other = "a new run would take train.precision: no and model.dtype: float32 on this machine"
    assert (other in found.note) is is_other


@pytest.fixture
def auto(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        model={"dtype": "auto"},
        train={"precision": "auto", "max_steps": 2, "save_every": 1, "eval_every": 0},
        adapter={"rank": {"method": "fixed", "max": 1, "window": 2}},
    )


@pytest.mark.slow
def test_a_run_in_bf16_goes_on_in_bf16_on_a_machine_without_units(
    auto: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "bf16_speed", lambda _: FAST)
    assert cli.run(["train", str(auto)]) == 0
    shown = "".join(capsys.readouterr())
    assert "chosen for auto: bfloat16 was 6.9 x" in " ".join(shown.split())
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["precision"] == {
        "asked": {"train.precision": "auto", "model.dtype": "auto"},
        "chosen": {"train.precision": "bf16", "model.dtype": "bfloat16"},
        "why": FAST.why,
        "ratio": 6.9,
    }
    assert record["identity"]["recipe"]["train"]["precision"] == "bf16"
    assert "dtype: bfloat16" in (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")

    monkeypatch.setattr(precision, "bf16_speed", lambda _: SLOW)
    assert cli.run(["train", str(auto), "train.max_steps=3"]) != 0
    capsys.readouterr()
    command = ["train", str(auto), "train.max_steps=3", "--allow-change", "train.max_steps"]
    assert cli.run(command) == 0
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "were chosen for auto when this run began, and kept; a new run would take" in shown
    again: dict[str, Any] = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert again["precision"] == record["precision"]
    assert again["identity"]["recipe"]["train"]["precision"] == "bf16"
    assert [change["key"] for change in again["changes"]] == ["train.max_steps"]
    # The finished run is known again, whatever this machine would choose.
    assert cli.run(command) == 0
    assert "is finished; nothing was done" in " ".join("".join(capsys.readouterr()).split())


def test_the_plan_counts_with_what_auto_takes(
    auto: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {}
    for name, speed in (("fast", FAST), ("slow", SLOW)):
        monkeypatch.setattr(precision, "bf16_speed", lambda _, speed=speed: speed)
        assert cli.run(["plan", str(auto), "--json"]) == 0
        out, err = capsys.readouterr()
        assert speed.why[:20] in " ".join(err.split())
        sizes[name] = json.loads(out)["base_model_bytes"]
    assert sizes["slow"] == 2 * sizes["fast"]


def test_a_process_trains_in_one_precision_after_another() -> None:
    for wanted in ("bf16", "no", "no", "bf16"):
        accelerator = make_accelerator(TrainRecipe(precision=wanted))
        assert accelerator.mixed_precision == wanted
        assert accelerator.native_amp == (wanted == "bf16")


def test_an_accelerator_of_the_users_keeps_its_precision() -> None:
    theirs = Accelerator(mixed_precision="bf16")
    assert make_accelerator(TrainRecipe(precision="bf16")).mixed_precision == "bf16"
    with pytest.raises(RecipeError, match=r"train\.precision is no, but this process has") as error:
        make_accelerator(TrainRecipe(precision="no"))
    assert "mixed_precision='bf16'" in str(error.value)
    assert "a process of its own" in str(error.value)
    assert theirs.mixed_precision == "bf16"
