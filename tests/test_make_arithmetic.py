"""The quickstart's problems: right answers, splits that share no numbers, the same bytes again."""

from __future__ import annotations

import importlib.util
import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_arithmetic.py"
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")

Rows = list[dict[str, str]]


def run(output: Path, *options: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(output), *options],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """The data set that scripts/quickstart makes."""
    folder = tmp_path_factory.mktemp("arithmetic")
    assert run(folder).returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in folder.iterdir()
    }


def steps(row: dict[str, str]) -> list[tuple[int, str, int, int]]:
    """The calculations that an answer shows: left, sign, right, result."""
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in EQUATION.findall(row["answer"])]


@pytest.mark.slow
def test_sizes_columns_and_ids(splits: dict[str, Rows]):
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 2000,
        "validation": 100,
        "test": 300,
    }
    every = [row for rows in splits.values() for row in rows]
    assert {tuple(row) for row in every} == {("id", "question", "answer")}
    assert len({row["id"] for row in every}) == len(every)


def test_every_answer_is_right_and_ends_in_its_number(splits: dict[str, Rows]):
    for row in (row for rows in splits.values() for row in rows):
        worked = steps(row)
        for left, sign, right, result in worked:
            assert SIGNS[sign](left, right) == result > 0, row
        shown = " ".join(f"{a} {sign} {b} = {c}." for a, sign, b, c in worked)
        assert row["answer"] == f"{shown} The answer is {worked[-1][3]}."


def test_every_question_gives_the_numbers_of_its_answer(splits: dict[str, Rows]):
    for row in (row for rows in splits.values() for row in rows):
        first, *rest = steps(row)
        needed = [first[0], first[2]]
        before = first
        for step in rest:
            assert step[0] == before[3], f"the second step does not go on from the first: {row}"
            needed.append(step[2])
            before = step
        assert sorted(map(int, re.findall(r"\d+", row["question"]))) == sorted(needed), row
        assert row["question"].endswith("?")
        assert "{" not in row["question"]


def test_splits_share_no_pair_of_numbers_and_no_question(splits: dict[str, Rows]):
    pairs = {
        name: {frozenset((left, right)) for row in rows for left, _, right, _ in steps(row)}
        for name, rows in splits.items()
    }
    questions = {name: {row["question"] for row in rows} for name, rows in splits.items()}
    for one, other in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not pairs[one] & pairs[other]
        assert not questions[one] & questions[other]
    for name, rows in splits.items():
        assert len(questions[name]) == len(rows)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_holds_every_sign_and_both_lengths(splits: dict[str, Rows], split: str):
    rows = splits[split]
    for sign in SIGNS:
        assert sum(sign in {step[1] for step in steps(row)} for row in rows) >= len(rows) / 20
    assert 0.3 < sum(len(steps(row)) == 2 for row in rows) / len(rows) < 0.5


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path):
    sizes = ["--num-train", "50", "--num-validation", "5", "--num-test", "20"]

    def written(name: str, seed: int, hash_seed: str) -> dict[str, bytes]:
        folder = tmp_path / name
        assert run(folder, "--seed", str(seed), *sizes, hash_seed=hash_seed).returncode == 0
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = written("first", 7, "1")
    assert written("again", 7, "2") == first
    other = written("other", 8, "1")
    assert all(other[name] != first[name] for name in first)
    assert b"\r" not in b"".join(first.values())


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_a_number_of_rows_that_makes_no_sense_is_refused(tmp_path: Path, number: str):
    refused = run(tmp_path / "data", f"--num-test={number}")
    assert refused.returncode == 2
    assert f"--num-test: got '{number}', expected a whole number above 0" in refused.stderr
    assert not (tmp_path / "data").exists()


@pytest.fixture
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_arithmetic", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    del sys.modules[spec.name]
    return module


def test_more_rows_than_there_are_questions_is_an_error(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generator, "MAX_TRIES", 200)
    monkeypatch.setattr(generator, "NAMES", ["Ana", "Ben"])
    monkeypatch.setattr(generator, "THINGS", ["plums"])
    with pytest.raises(
        ValueError, match=r"^validation: got \d+ different questions, expected 90000; ask for fewer"
    ):
        generator.make_split("validation", 90_000, seed=0, taken=set())
