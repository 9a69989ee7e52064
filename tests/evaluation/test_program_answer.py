"""Programs in completions, their tests, and pass@k against counting by hand."""

from __future__ import annotations

import itertools

import pytest

from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.scoring import pass_at_k
from kpsvd_tune.evaluation.tasks import program_text, program_with_tests

ONE_TEST = {"test_list": ["assert f(1) == 2"]}


PROGRAMS = [
    ("x = 1", "x = 1"),
    ("", ""),
    # The prompt, or a template, opened the block.
    ("x = 1\n```", "x = 1\n"),
    ("x = 1\n```\nThis sets x.\n", "x = 1\n"),
    ("x = 1\n```\nOr:\n```\ny = 2\n```", "x = 1\n"),
    ("Sure\n```\nx = 1\n```", "x = 1\n"),
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
    (" ", " "),
    ("\n\n", "\n\n"),
    ("\tx = 1", "\tx = 1"),
    ("x = 1\n", "x = 1\n"),
    ("\nx = 1", "\nx = 1"),
    ("x = 1[DONE]", "x = 1"),
    ("x = 1\n[done]", "x = 1\n[done]"),
    ("[DONE]\nx = 1", ""),
    ("x = [1]\n[DONE]\n[DONE]", "x = [1]\n"),
    ("x = 'DONE'", "x = 'DONE'"),
    ("[BEGIN]\nx = 1", "[BEGIN]\nx = 1"),
    ("x = 1\n[DONE]\n```python\ny = 2\n```", "y = 2\n"),
    ("``` \nx = 1\n```", "x = 1\n"),
    ("```Python\nx = 1\n```", "x = 1\n"),
    ("```python3\nx = 1\n```", "x = 1\n"),
    ("```py title=a.py\nx = 1\n```", "x = 1\n"),
    ("```python\r\nx = 1\r\n```", "x = 1\r\n"),
    ("```\n```", ""),
    ("```python\n```\n```python\nx = 1\n```", ""),
    ("```python\n", ""),
    ("```python", "```python"),
    ("```x = 1```", "```x = 1```"),
    ("`x = 1`", "`x = 1`"),
    ("Use `f`.\n```\nx = 1\n```", "x = 1\n"),
    ("~~~\nx = 1\n~~~", "~~~\nx = 1\n~~~"),
    ("```python\nx = 1\n\n\ny = 2\n```", "x = 1\n\n\ny = 2\n"),
    ("```python\n    x = 1\n```", "    x = 1\n"),
    ("```python\n\tx = 1\n```", "\tx = 1\n"),
    ("```python\nx = '`'\n```", "x = '`'\n"),
    ("```python\nx = '``'\n```", "x = '``'\n"),
    ("```python\nx = 1```", "x = 1"),
    ("```python\nx = 1\n````", "x = 1\n"),
    ("   ```python\nx = 1\n   ```", "x = 1\n   "),
    ("1. First\n   ```\nx = 1\n```\n2. Then", "x = 1\n"),
    ("```python\nx = 1\n```[DONE]", "x = 1\n"),
    ("```python\nx = 1\n[DONE]\n```", "x = 1\n"),
    ("x = 1  # comment", "x = 1  # comment"),
    ("# only a comment", "# only a comment"),
    ('"""text"""\nx = 1', '"""text"""\nx = 1'),
    ("def f():\n    return 1\n\nprint(f())", "def f():\n    return 1\n\nprint(f())"),
    ("Here it is: x = 1", "Here it is: x = 1"),
    ("x = 'ä\u2212'", "x = 'ä\u2212'"),
    ("```python\nx = 'ä\u2212'\n```", "x = 'ä\u2212'\n"),
    ("x = 1\x00", "x = 1\x00"),
    ("```\nx = 1\n```\n[DONE]\n```\ny = 2\n```", "x = 1\n"),
    ("```output\n5\n```\n```python\nx = 1\n```", "5\n"),
    ("def f(x):\r\n    return x\r\n", "def f(x):\r\n    return x\r\n"),
]


def test_there_are_sixty_cases():
    assert len({completion for completion, _ in PROGRAMS}) >= 60


@pytest.mark.parametrize(("completion", "expected"), PROGRAMS)
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
