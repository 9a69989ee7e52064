"""From completions to scores: every scorer's verdicts, the figures, and when scoring is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation import tasks
from kpsvd_tune.evaluation.completions import Completion, read_completions
from kpsvd_tune.evaluation.sandbox.run import Program, RunResult, Status
from kpsvd_tune.evaluation.scoring import (
    check_code_execution,
    missing_scorers,
    score_completions,
)
from kpsvd_tune.report.results import Score


def scores_of(task: str, pairs: Sequence[tuple[str, object]], **options) -> dict[str, Score]:
    completions = [Completion(i, "", text, gold) for i, (text, gold) in enumerate(pairs)]
    return {each.scorer: each for each in score_completions(task, completions, **options)}


@pytest.fixture
def without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "math_verify_available", lambda: False)


@pytest.fixture
def run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs pass when they hold "right"; nothing is run."""

    def run(programs: list[Program], **_) -> list[RunResult]:
        words: dict[str, Status] = {"right": "passed", "broken": "invalid"}
        return [RunResult(words.get(program.source, "failed")) for program in programs]

    monkeypatch.setattr(tasks, "run_programs", run)


def test_gsm8k_has_three_scorers_that_see_different_answers():
    gold = "2 + 3 = 5\n#### 5"
    pairs = [("#### 5", gold), ("it is 5", gold), ("The answer is: 5", gold), ("", gold)]
    scores = scores_of("gsm8k", pairs)
    assert {name: (s.value, s.unextractable) for name, s in scores.items()} == {
        "strict": (0.25, 3),
        "flexible": (0.75, 1),
        "metamath": (0.25, 3),
    }


@pytest.mark.parametrize("gold", ["#### 1,200", "1200", "It is 1,200.", 1200])
def test_gsm8k_gold_may_be_a_solution_or_a_number(gold: object):
    scores = scores_of("gsm8k", [("#### 1200", gold), ("The answer is: 1,200", gold)])
    assert scores["strict"].value == scores["metamath"].value == 0.5
    assert scores["flexible"].value == 1.0


@pytest.mark.usefixtures("without_math_verify")
def test_math_compares_boxes_or_stated_answers():
    gold = "It is half, so \\boxed{\\frac{1}{2}}."
    pairs = [("\\boxed{1/2}", gold), ("The answer is: 0.5", gold), ("\\boxed{2}", "2"), ("2", "2")]
    scores = scores_of("math", pairs)
    assert {name: (s.value, s.unextractable) for name, s in scores.items()} == {
        "is_equiv": (0.5, 2),
        "metamath": (0.25, 3),
    }


@pytest.mark.parametrize(
    ("completion", "gold", "by_number", "by_text"),
    [
        ("5", "5", True, True),
        ("so 2 + 3 = 5.", "5", True, False),
        ("5 nuts", "nuts: 5", True, False),
        ("5.0", "5", True, False),
        ("1,000", "1000", True, False),
        ("4", "5", False, False),
        ("none", "5", False, False),
        ("Red", "red.", True, True),
        ("blue", "red", False, False),
        (" red\n", "red", True, True),
        ("", "red", False, False),
        ("", "5", False, False),
    ],
)
def test_exact_match(completion: str, gold: str, by_number: bool, by_text: bool):
    scores = scores_of("exact_match", [(completion, gold)])
    assert scores["exact_match"].value == by_number
    assert scores["exact_text"].value == by_text


@pytest.mark.parametrize("num_right", [0, 1, 7, 40])
def test_the_figures_of_a_score(num_right: int):
    pairs = [("1" if i < num_right else "none", "1") for i in range(40)]
    score = scores_of("exact_match", pairs)["exact_match"]
    p = num_right / 40
    points = {str(i): float(i < num_right) for i in range(40)}
    assert score == Score(
        "exact_match", p, 40, math.sqrt(p * (1 - p) / 40), 40 - num_right, points=points
    )


@pytest.mark.usefixtures("run_nothing")
def test_mbpp_counts_questions_and_broken_programs():
    gold = {"test_list": ["assert True"]}
    pairs = [("right", gold), ("wrong", gold), ("broken", gold), ("", gold)]
    scores = scores_of("mbpp", pairs, sandbox="none")
    assert scores == {"pass@1": Score("pass@1", 0.25, 4, math.sqrt(0.25 * 0.75 / 4), 2)}


@pytest.mark.usefixtures("run_nothing")
def test_pass_at_k_of_several_samples():
    gold = {"test_list": ["assert True"]}
    texts = {0: ["right", "wrong", "wrong", "wrong"], 1: ["wrong"] * 4}
    completions = [
        Completion(i, "", text, gold, sample)
        for i, samples in texts.items()
        for sample, text in enumerate(samples)
    ]
    scores = score_completions("mbpp", completions, sandbox="none")
    assert [(s.scorer, s.value, s.n) for s in scores] == [("pass@1", 0.125, 2), ("pass@4", 0.5, 2)]


def test_several_samples_of_a_question_count_once():
    completions = [Completion(0, "", text, "1", i) for i, text in enumerate(["1", "1", "2", ""])]
    (score, _) = score_completions("exact_match", completions)
    assert (score.value, score.n, score.unextractable) == (0.5, 1, 1)


def test_code_is_refused_before_anything_is_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "run_programs", lambda *_, **__: pytest.fail("ran a program"))
    with pytest.raises(InputError, match="Type --allow-code-execution"):
        scores_of("mbpp", [("right", ["assert True"])])


def test_only_programs_need_permission():
    for task in ("gsm8k", "math", "exact_match"):
        check_code_execution([task], None)
    with pytest.raises(InputError, match="task mbpp runs programs .* Type --allow-code-execution"):
        check_code_execution(["gsm8k", "mbpp"], None)
    check_code_execution(["mbpp"], "none")


@pytest.mark.parametrize(
    ("task", "gold", "error", "message"),
    [
        ("gsm", "1", InputError, "the task must be one of gsm8k, math, mbpp, exact_match, label, "),
        ("gsm8k", ["assert True"], DataError, "was this file written for another task"),
        ("math", None, DataError, "completion with id 0 is 'None'. Expected a text"),
    ],
)
def test_gold_of_another_task_is_refused(
    task: str, gold: object, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        scores_of(task, [("1", gold)])


def test_nothing_to_score_is_refused():
    with pytest.raises(DataError, match="no completion to score for the task gsm8k"):
        score_completions("gsm8k", [])


def test_scoring_again_reads_what_an_evaluation_wrote(tmp_path: Path):
    file = tmp_path / "completions.jsonl"
    rows = [{"id": i, "prompt": "?", "completion": f"#### {i}", "gold": "#### 1"} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [
        (s.scorer, s.value, s.n) for s in score_completions("gsm8k", read_completions(file))
    ] == [
        ("strict", 0.25, 4),
        ("flexible", 0.25, 4),
        ("metamath", 0.0, 4),
    ]


@pytest.mark.usefixtures("without_math_verify")
def test_a_missing_scorer_is_named_with_its_cure():
    assert "pip install 'kpsvd-tune[math]'" in missing_scorers("math")[0]
    assert missing_scorers("gsm8k") == ()
