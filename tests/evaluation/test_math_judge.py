"""Judging by value in worker processes: with a stand-in for math-verify, and with the real one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from kpsvd_tune.errors import InputError, ResourceError
from kpsvd_tune.evaluation import math_answer
from kpsvd_tune.evaluation.math_answer import judge_by_value, math_verify_available

# Answers are texts; "hang" never ends, "die" ends the process, "fail" raises.
STAND_IN = """
import os, time

def parse(text):
    if "hang" in text:
        time.sleep(600)
    if "die" in text:
        os._exit(1)
    if "fail" in text:
        raise RuntimeError(text)
    print("noise on standard output")
    inner = text.removeprefix("\\\\boxed{").removesuffix("}")
    return [inner] if inner.strip() else []

def verify(gold, answer):
    return gold == answer
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(math_answer, "math_verify_available", lambda: True)


@pytest.mark.usefixtures("stand_in")
def test_verdicts_come_in_order_and_a_bad_pair_harms_no_other():
    pairs = [("1", "1"), ("1", "2"), ("1", "die"), ("1", "fail"), ("1", " "), ("2", "2")]
    right, wrong, none = (True, True), (True, False), (False, False)
    assert judge_by_value(pairs, num_workers=2) == [right, wrong, none, none, none, right]


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_a_judgement_that_never_ends_counts_as_wrong():
    start = time.monotonic()
    assert judge_by_value([("1", "hang"), ("1", "1")], seconds=0.5, num_workers=1) == [
        (False, False),
        (True, True),
    ]
    assert time.monotonic() - start < 60


def test_a_worker_that_cannot_start_is_reported(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "math_verify.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(math_answer, "math_verify_available", lambda: True)
    with pytest.raises(ResourceError, match="worker process of the scorer math_verify ended"):
        judge_by_value([("1", "1")])


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math_answer, "math_verify_available", lambda: False)
    with pytest.raises(InputError, match=r"Run: pip install 'kpsvd-tune\[math\]'"):
        judge_by_value([("1", "1")])


def test_no_pairs_start_no_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math_answer, "math_verify_available", lambda: True)
    assert judge_by_value([]) == []


EQUAL = [
    ("5", "5"),
    ("5", "5.0"),
    ("5", "$5$"),
    ("5", "10/2"),
    ("-5", "-5"),
    ("0", "0"),
    ("0.5", "\\frac12"),
    ("0.5", "\\frac{1}{2}"),
    ("\\frac{1}{2}", "\\frac{2}{4}"),
    ("\\frac{1}{2}", "\\dfrac{1}{2}"),
    ("\\frac{3}{4}", "0.75"),
    ("\\frac{-1}{2}", "-\\frac{1}{2}"),
    ("1000", "1,000"),
    ("1000000", "1,000,000"),
    ("\\sqrt{12}", "2\\sqrt{3}"),
    ("\\sqrt{4}", "2"),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
    ("x+1", "1+x"),
    ("2x", "x+x"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x^2-1", "(x-1)(x+1)"),
    ("\\pi", "\\pi"),
    ("2\\pi", "\\pi \\cdot 2"),
    ("2^3", "8"),
    ("(1,2)", "(1, 2)"),
    ("(1,2)", "\\left(1,2\\right)"),
    ("[0,1]", "\\left[0, 1\\right]"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("5\\%", "5\\%"),
    ("90^\\circ", "90"),
]
DIFFERENT = [
    ("5", "6"),
    ("5", "-5"),
    ("5", "50"),
    ("0", "1"),
    ("\\frac{1}{2}", "\\frac{1}{3}"),
    ("\\frac{1}{2}", "2"),
    ("0.5", "0.6"),
    ("1000", "100"),
    ("\\sqrt{2}", "2"),
    ("\\sqrt{3}", "-\\sqrt{3}"),
    ("x", "y"),
    ("x+1", "x-1"),
    ("x^2", "x^3"),
    ("2x", "x"),
    ("\\pi", "3"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1,3)"),
    ("(1,2)", "(1,2,3)"),
    ("(0,1)", "[0,1]"),
    ("\\{1,2\\}", "\\{1,3\\}"),
    ("\\{1,2\\}", "\\{1\\}"),
    ("2^3", "6"),
    ("\\infty", "-\\infty"),
    ("7", "\\frac{7}{2}"),
    ("\\frac{22}{7}", "\\pi"),
]
NO_ANSWER = ["", " ", "no idea", "...", "?!"]


@pytest.mark.slow
@pytest.mark.skipif(not math_verify_available(), reason="needs the extra kpsvd-tune[math]")
def test_sixty_cases_of_the_real_judge():
    cases = [(gold, f"\\boxed{{{answer}}}", (True, True)) for gold, answer in EQUAL]
    cases += [(gold, f"\\boxed{{{answer}}}", (True, False)) for gold, answer in DIFFERENT]
    cases += [("5", text, (False, False)) for text in NO_ANSWER]
    assert len(cases) >= 60
    verdicts = judge_by_value([(gold, text) for gold, text, _ in cases], seconds=30)
    wrong = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict != case[2]]
    assert wrong == []
