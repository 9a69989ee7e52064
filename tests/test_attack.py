"""A small part of scripts/attack.py: mutated recipes and damaged files end in words, in time."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from kpsvd_tune.errors import InputError, NonFiniteError
from kpsvd_tune.evaluation.sandbox.run import sandbox_fault

SCRIPT = Path(__file__).parents[1] / "scripts" / "attack.py"


@pytest.fixture(scope="module")
def attack() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attack", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["attack"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_mutated_recipes_are_answered(attack: ModuleType) -> None:
    found = list(attack.attacks(seed=7, recipes=150, files=0, limit=10))
    assert len(found) == 150
    assert [each for each in found if each.problem] == []


@pytest.mark.slow
def test_damaged_files_are_answered(attack: ModuleType) -> None:
    found = list(attack.attacks(seed=7, recipes=0, files=12, limit=30))
    assert len(found) == 12
    assert [each for each in found if each.problem] == []


@pytest.mark.slow
@pytest.mark.skipif(sandbox_fault() is not None, reason="needs bubblewrap")
def test_programs_are_judged_rightly(attack: ModuleType) -> None:
    found = list(attack.attacks(seed=7, recipes=0, files=0, limit=30, programs=10))
    assert len(found) == 10
    assert [each for each in found if each.problem] == []


def _fail(error: BaseException | None) -> Callable[..., None]:
    def load_recipe(*arguments: object, **options: object) -> None:
        if error is not None:
            raise error
        while True:
            pass

    return load_recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("oops"), "a traceback: "),
        (SystemExit(3), "raised SystemExit: 3"),
        (None, "took longer than 1 s"),
        (NonFiniteError("nan"), "exit code 3: error: nan"),
        (InputError("wrong"), ""),
    ],
)
def test_an_answer_that_is_wrong_is_noticed(
    attack: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    said: str,
) -> None:
    monkeypatch.setattr("kpsvd_tune.commands.validate.load_recipe", _fail(error))
    found, _ = attack.run(["validate", "x"], limit=1 if error is None else 30)
    assert found.startswith(said)
    assert bool(found) == bool(said)
