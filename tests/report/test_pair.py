"""Two runs side by side: differences, their standard errors, and what they rest on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_folder import write_run

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.paired import paired_scores
from kpsvd_tune.report.pair import ScoreDifference

OLD = Path(__file__).parents[1] / "fixtures" / "0.1-before-house"
RIGHT = ["4", "6", "8", "10"]


def answers(folder: Path) -> Path:
    return folder / "evaluation" / "after" / "exact_match" / "completions.jsonl"


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    first = write_run(tmp_path / "one", answers={"after": ["4", "6", "0", "0"]})
    second = write_run(
        tmp_path / "two",
        steps=80,
        loss=1.2,
        answers={"after": ["4", "0", "8", "10"]},
        recipe={"train": {"max_steps": 80, "max_grad_norm": 1.0, "learning_rate": 2e-3}},
        versions={"torch": "2.9.0", "kpsvd-tune": "0.1", "python": "3.11.9"},
    )
    return first, second


def report(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert cli.run(["report", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_scores_are_paired_question_by_question(runs: tuple[Path, Path]) -> None:
    found = paired_scores(*map(answers, runs))["exact_match"]
    # Right are 1, 1, 0, 0 and 1, 0, 1, 1: the differences are 0, -1, 1, 1.
    assert (found.n, found.first_better, found.second_better) == (4, 1, 2)
    assert found.difference == 0.25
    spread = (0.25**2 + 1.25**2 + 0.75**2 + 0.75**2) / 3
    assert found.stderr == pytest.approx(math.sqrt(spread / 4))


def test_only_questions_that_both_answered_are_paired(runs: tuple[Path, Path]) -> None:
    first, second = map(answers, runs)
    lines = second.read_text().splitlines()
    # The file has row 3 first. One question is gone, and one has another gold.
    changed = json.dumps({**json.loads(lines[1]), "gold": "99"})
    second.write_text("\n".join([changed, *lines[2:]]) + "\n")
    found = paired_scores(first, second)["exact_match"]
    assert (found.n, found.difference) == (2, -0.5)
    # An equal number and answer may be another question's, of another file of rows.
    other = json.dumps({**json.loads(lines[2]), "prompt": "Another question?"})
    second.write_text("\n".join([changed, other, *lines[3:]]) + "\n")
    assert paired_scores(first, second)["exact_match"].n == 1
    second.write_text(changed + "\n")
    with pytest.raises(DataError, match="the answers have no question in the same words in common"):
        paired_scores(first, second)


def test_answers_of_other_tasks_and_programs_are_not_paired(runs: tuple[Path, Path]) -> None:
    first, second = map(answers, runs)
    (second.parent / "evaluation.json").write_text('{"task": "gsm8k"}')
    with pytest.raises(DataError, match="the answers are of exact_match and of gsm8k"):
        paired_scores(first, second)
    for each in (first, second):
        (each.parent / "evaluation.json").write_text('{"task": "mbpp"}')
    with pytest.raises(DataError, match="mbpp would run the programs of both again"):
        paired_scores(first, second)


def test_what_differs_is_told(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *runs)
    assert found["recipe"] == [
        ["train.max_steps", "40", "80"],
        ["train.learning_rate", "0.001", "0.002"],
    ]
    assert found["versions"] == [["torch", "2.8.0", "2.9.0"]]
    assert found["made_of"] == [
        ["rows", "the same", "the same"],
        ["base model", "the same", "the same"],
    ]
    assert found["curve_name"] == "validation loss"
    assert [step for step, *_ in found["curve"]] == [0, 8, 16, 24, 32, 40]
    assert found["curve"][0] == [0, 3.0, 3.2]
    score = next(each for each in found["scores"] if each["scorer"] == "exact_match")
    assert (score["is_paired"], score["difference"], score["n"]) == (True, 0.25, 4)
    assert score["how"] == (
        "question by question over 4: the second is better in 2, the first in 1"
    )


def test_without_stored_answers_the_two_count_as_independent(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(runs[1] / "evaluation")
    (score,) = report(capsys, *runs)["scores"]
    assert (score["is_paired"], score["difference"]) == (False, 0.25)
    assert score["stderr"] == pytest.approx(math.hypot(0.25, math.sqrt(0.75 * 0.25 / 4)))
    assert score["how"] == "as if the two were independent, for no answers are stored"


@pytest.mark.parametrize(
    ("difference", "stderr", "told"),
    [
        (0.1, 0.06, "could be chance"),
        (-0.1, 0.05, "more than chance"),
        (0.0, 0.0, "could be chance"),
        (0.1, None, "its standard error is not known"),
    ],
)
def test_a_difference_is_judged_by_its_standard_error(
    difference: float, stderr: float | None, told: str
) -> None:
    score = ScoreDifference("t", "s", 0.0, difference, difference, stderr, 9, True, "how")
    assert score.verdict.startswith(told)


def test_other_rows_and_another_base_are_warned_of(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = {"dataset": "e" * 64, "base": {"config.json": "f" * 64}, "recipe": {}}
    third = write_run(tmp_path / "three", finished=False, identity=other)
    found = report(capsys, runs[0], third)
    assert ["rows", "d" * 12, "e" * 12] in found["made_of"]
    assert ["base model, config.json", "c" * 12, "f" * 12] in found["made_of"]
    notes = " ".join(found["notes"])
    assert "the rows differ, and so may the held-out ones" in notes
    assert "the base models differ" in notes
    assert "three is not finished: stopped at step 40" in notes


def test_the_terminal_shows_both(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["report", *map(str, runs)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "one: finished after 40 steps",
        "validation loss 1.0366 1.2366",
        "exact_match: 50.0 % and 75.0 %, difference +25.0 ± 47.9 points; could be chance",
        "40 1.0366 1.4707 +0.4340",
        "train.learning_rate 0.001 0.002",
        "torch 2.8.0 2.9.0",
    ):
        assert part in shown, part


def test_the_page_of_two_runs(
    runs: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", *map(str, runs), "--html"]) == 0
    assert capsys.readouterr().out == "page: one-and-two.html\n"
    page = (tmp_path / "one-and-two.html").read_text()
    for part in (
        '<th scope="row">train.learning_rate</th><td>0.001</td><td>0.002</td>',
        "<b>+25.0 ± 47.9 points</b>",
        '<th scope="row">40</th><td>1.0366</td><td>1.4707</td><td>+0.4340</td>',
        'id="checks"',
        'id="trained"',
    ):
        assert part in page, part


@pytest.mark.parametrize("name", ["unfinished", "initialised"])
def test_runs_of_an_older_version_are_compared(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, OLD / "finished", OLD / name)
    assert found["scores"] == []
    assert bool(found["curve"]) == (name == "unfinished")


def test_what_cannot_be_compared_is_refused(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: Any) -> str:
        assert cli.run(["report", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "are the same run; expected two" in refusal(runs[0], runs[0])
    assert "did you mean" in refusal(runs[0], tmp_path / "tow")
    comparison = tmp_path / "compared"
    comparison.mkdir()
    (comparison / "compare.json").write_text("{}")
    assert "is the folder of a comparison; expected two runs" in refusal(runs[0], comparison)
    assert "whose page `compare` writes" in refusal(comparison, "--html")
    assert "--output is the place of the page: add --html" in refusal(runs[0], "-o", "x.html")
