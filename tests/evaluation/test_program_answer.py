"""Programs in completions, their tests, and pass@k against counting by hand."""

from __future__ import annotations

import itertools

import pytest

from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.program_answer import pass_at_k, program_text, program_with_tests

ONE_TEST = {"test_list": ["assert f(1) == 2"]}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("x = 1", "x = 1"),
        ("", ""),
        ("x = 1\n[DONE]\nmore", "x = 1\n"),
        ("[DONE]", ""),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("``` py\nx = 1\n```\nText", "x = 1\n"),
        ("Sure:\n```python\nx = 1\n```\n```python\ny = 2\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("```python\nx = 1\n[DONE]", "x = 1\n"),
        ("x = 1\r\ny = 2", "x = 1\r\ny = 2"),
        ("    return 1", "    return 1"),
    ],
)
def test_program_text(completion: str, expected: str):
    assert program_text(completion) == expected


@pytest.mark.parametrize(
    ("gold", "tests"),
    [
        (ONE_TEST, ("", "assert f(1) == 2")),
        (["assert a", "assert b"], ("", "assert a", "assert b")),
        ("assert a\nassert b", ("", "assert a\nassert b")),
        (
            {"test_list": ["assert a"], "test_setup_code": "a = 1", "test_imports": ["import re"]},
            ("a = 1", "import re", "assert a"),
        ),
        ({"test_list": ["assert a"], "test_setup_code": None}, ("", "assert a")),
    ],
)
def test_tests_run_behind_set_up_and_imports(gold: object, tests: tuple[str, ...]):
    assert program_with_tests("x", gold).tests == tests


@pytest.mark.parametrize("gold", [None, 5, {}, [], {"test_list": []}, {"test_list": "assert a"}])
def test_gold_without_tests_is_refused(gold: object):
    with pytest.raises(DataError, match="Expected the tests of the program"):
        program_with_tests("x", gold)


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k"),
    [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)],
)
def test_pass_at_k_counts_draws_with_a_right_sample(num_samples: int, num_correct: int, k: int):
    draws = list(itertools.combinations(range(num_samples), k))
    hits = sum(any(sample < num_correct for sample in draw) for draw in draws)
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(hits / len(draws), abs=1e-15)


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_needs_as_many_samples(k: int):
    with pytest.raises(ValueError, match="k must be 1 to 3, the number of samples, got"):
        pass_at_k(3, 1, k)
