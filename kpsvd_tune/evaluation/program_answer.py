"""Programs in text, and how many of several must be right: the rules of MBPP.

Source: Austin et al. 2021 for the task; Chen et al. 2021, section 2.1, for pass@k.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.sandbox.run import Program

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_END_MARKS = ("[DONE]",)


def program_text(completion: str) -> str:
    """The program in a completion: its first fenced block, else all of it up to "[DONE]"."""
    fenced = _FENCE.search(completion)
    text = fenced[1] if fenced else completion
    for mark in _END_MARKS:
        text = text.partition(mark)[0]
    return text


def program_with_tests(completion: str, gold: Any) -> Program:
    """The program of a completion with the tests of its row.

    Args:
        completion: what the model wrote.
        gold: ``{"test_list": [...], "test_setup_code": "", "test_imports": [...]}`` with the last
            two optional, or a list of tests, or one text of tests.

    Raises:
        DataError: `gold` is none of these.
    """
    if isinstance(gold, str):
        gold = {"test_list": [gold]}
    elif isinstance(gold, Sequence):
        gold = {"test_list": gold}
    tests = gold.get("test_list") if isinstance(gold, Mapping) else None
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise DataError(
            f"gold is {str(gold)[:80]!r}. Expected the tests of the program: "
            '{"test_list": ["assert ...", ...]}, with "test_setup_code" and "test_imports" '
            "where the row has them."
        )
    # Behind the program, because the set-up of some rows uses its classes.
    setup = str(gold.get("test_setup_code") or "")
    imports = [str(line) for line in gold.get("test_imports") or ()]
    return Program(program_text(completion), (setup, *imports, *(str(test) for test in tests)))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of the samples, drawn without putting back, hold a right one.

    Unbiased: 1 - C(num_samples - num_correct, k) / C(num_samples, k).

    Raises:
        ValueError: k is not within 1 and num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be 1 to {num_samples}, the number of samples, got {k}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
