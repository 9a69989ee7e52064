"""The table of tasks: where each finds its rows, how it is asked, and which scorers judge it.

To add a scorer, write what it makes of one answer as a function of (completion, gold), and add it
to `TASKS` with :func:`each`. A scorer that has to see all answers at once, because it starts
processes for them, is a :class:`ScoringRule` with a function of its own. To add a task, add an
entry to `TASKS` and its name to `EvaluationRecipe.task` (and to `_NEED_A_PATH` there, where it has
no rows of its own). The first scorer of a task is its headline figure.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation import text_answer
from kpsvd_tune.evaluation.completions import Completion
from kpsvd_tune.evaluation.json_answer import (
    Right,
    parse_answer,
    right_answer,
    same,
    schema_fault,
    shared_fields,
)
from kpsvd_tune.evaluation.label_answer import confusion, given_label, macro_f1
from kpsvd_tune.evaluation.math_answer import (
    INSTALL,
    boxed_answer,
    is_equiv,
    judge_by_value,
    math_verify_available,
    stated_answer,
)
from kpsvd_tune.evaluation.numeric_answer import (
    flexible_answer,
    gsm8k_gold,
    last_number,
    metamath_answer,
    plain_text,
    strict_answer,
)
from kpsvd_tune.evaluation.sandbox.run import Program, Sandbox, run_programs
from kpsvd_tune.report.results import Score

Progress = Callable[[int, int], None]  # told (done, total)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_CLOSING = re.compile(r"^```[ \t]*$", re.MULTILINE)
_MOST_PARSED = 100_000  # characters of a program
_END_OF_PROGRAM = "[DONE]"


@dataclass(frozen=True)
class Verdict:
    """What a scorer made of one completion; a completion without an answer in it is wrong."""

    is_correct: bool
    is_extracted: bool = True
    credit: float | None = None  # 0 to 1, of a scorer that gives parts; None: 1 or 0

    @property
    def points(self) -> float:
        """What the completion is worth, 0 to 1."""
        return float(self.is_correct) if self.credit is None else self.credit


Judge = Callable[[Sequence[Completion], Sandbox | None, Progress | None], list[Verdict]]


@dataclass(frozen=True)
class ScoringRule:
    """One way to judge the answers of a task."""

    judge: Judge  # from completions, the sandbox and progress: one verdict each, in order
    is_pass_at_k: bool = False  # instead of the share of right answers
    # A figure of all answers together, in place of the mean of the verdicts.
    total: Callable[[Sequence[Completion]], Score] | None = None
    # How often each right label was answered by which, where that is asked for.
    confusion: Callable[[Sequence[Completion]], Mapping[str, Mapping[str, int]]] | None = None
    applies: Callable[[Sequence[Completion]], bool] = lambda _: (
        True
    )  # whether there is such a score
    missing: Callable[[], str | None] = lambda: None  # why it cannot be used here, and what to do


@dataclass(frozen=True)
class Task:
    """What is known of a task beside what the recipe says."""

    path: str | None = None  # hub id of its rows, used when the recipe names none
    name: str | tuple[str, ...] | None = None  # configuration on the hub, or several
    columns: Mapping[str, str] = field(default_factory=dict)  # of each role in these rows
    template: str = "{prompt}{completion}"  # where neither the recipe nor the training has one
    shots_split: str = "train"  # of worked examples
    scorers: Mapping[str, ScoringRule] = field(default_factory=dict)  # by reported name
    runs_code: bool = False  # scoring runs what the model wrote


def each(
    verdict: Callable[[str, str], Verdict], missing: Callable[[], str | None] = lambda: None
) -> ScoringRule:
    """A scorer that judges completions one by one, each as (its text, its gold text)."""
    return ScoringRule(
        lambda found, *_: [verdict(one.completion, gold_text(one)) for one in found],
        missing=missing,
    )


def gold_text(completion: Completion) -> str:
    """The gold of a completion as a text; DataError where it is neither a text nor a number."""
    gold = completion.gold
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        return str(gold)
    if not isinstance(gold, str):
        raise DataError(
            f"the gold of the completion with id {completion.id!r} is {str(gold)[:60]!r}. Expected "
            "a text; was this file written for another task?"
        )
    return gold


def _same(
    extract: Callable[[str], Any],
    of_gold: Callable[[str], Any],
    are_same: Callable[[Any, Any], bool] = operator.eq,
) -> Callable[[str, str], Verdict]:
    """Extracts an answer from the completion and compares it with the one in the gold."""

    def verdict(completion: str, gold: str) -> Verdict:
        answer = extract(completion)
        return Verdict(answer is not None and are_same(answer, of_gold(gold)), answer is not None)

    return verdict


def _metamath_gold(gold: str) -> float | None:
    answer = gsm8k_gold(gold)
    try:
        return None if answer is None else float(answer)
    except ValueError:
        return None


def _math_gold(gold: str) -> str:
    answer = boxed_answer(gold)
    return gold if answer is None else answer


def _same_value(completions: Sequence[Completion], *_: object) -> list[Verdict]:
    judged = judge_by_value([(gold_text(one), one.completion) for one in completions])
    return [Verdict(is_correct, is_extracted) for is_extracted, is_correct in judged]


def _same_label(completions: Sequence[Completion], *_: object) -> list[Verdict]:
    pairs = [given_label(completion)[:2] for completion in completions]
    return [Verdict(given == right, given is not None) for right, given in pairs]


def _of_json(
    points: Callable[[Any, Right], float],
) -> Callable[[Sequence[Completion], Sandbox | None, Progress | None], list[Verdict]]:
    """Gives each answer that is JSON its points, and others none."""

    def judge(completions: Sequence[Completion], *_: object) -> list[Verdict]:
        verdicts = []
        for completion in completions:
            right = right_answer(completion)
            is_json, value = parse_answer(completion.completion)
            credit = points(value, right) if is_json else 0.0
            verdicts.append(Verdict(credit == 1, is_json, credit))
        return verdicts

    return judge


def _like_text(measure: Callable[[str, str], float]) -> Callable[[str, str], Verdict]:
    """Gives each answer points by how near it is to the right one."""

    def verdict(completion: str, gold: str) -> Verdict:
        is_there = bool(completion.strip())
        credit = measure(completion, gold) if is_there else 0.0
        return Verdict(credit == 1, is_there, credit)

    return verdict


_exact_number = _same(last_number, last_number)
_exact_text = _same(lambda completion: plain_text(completion) or None, plain_text)


def _exact_match(completion: str, gold: str) -> Verdict:
    """By the last number of both where the gold holds one, else by the text."""
    verdict = _exact_text if last_number(gold) is None else _exact_number
    return verdict(completion, gold)


def _passes_tests(
    completions: Sequence[Completion], sandbox: Sandbox | None, progress: Progress | None
) -> list[Verdict]:
    assert sandbox is not None  # the task says that it runs code
    programs = [program_with_tests(one.completion, one.gold) for one in completions]
    results = run_programs(programs, sandbox=sandbox, progress=progress)
    return [
        Verdict(result.passed, result.status != "invalid" and bool(program.source.strip()))
        for result, program in zip(results, programs, strict=True)
    ]


def program_text(completion: str) -> str:
    """The program in a completion: its first fenced block, else all of it up to "[DONE]".

    What stands before a line of three backquotes is the program where it is one: the prompt, or a
    template, may open the block.
    """
    closing = _CLOSING.search(completion)
    if closing is not None and _is_program(completion[: closing.start()]):
        return completion[: closing.start()].partition(_END_OF_PROGRAM)[0]
    fenced = _FENCE.search(completion)
    return (fenced[1] if fenced else completion).partition(_END_OF_PROGRAM)[0]


def _is_program(text: str) -> bool:
    """Whether a text is Python and does something: a single word of prose is an expression."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = ast.parse(text[:_MOST_PARSED])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(each, ast.Expr) for each in parsed.body)


def asserts_nothing(test: str) -> bool:
    """Whether a test only compares, so that it passes whatever the program does."""
    try:
        body = ast.parse(test.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    idle = (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Constant, ast.Name)
    return all(isinstance(each, ast.Expr) and isinstance(each.value, idle) for each in body)


def program_with_tests(completion: str, gold: Any) -> Program:
    """The program of a completion with the tests of its row.

    `gold` is ``{"test_list": [...], "test_setup_code": "", "test_imports": [...]}``, the last two
    optional, a list of tests, or one text of tests; anything else raises DataError.
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
    # After the program, because the setup code of some rows uses its classes.
    setup = str(gold.get("test_setup_code") or "")
    imports = [str(line) for line in gold.get("test_imports") or ()]
    return Program(program_text(completion), (setup, *imports, *(str(test) for test in tests)))


_MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)

TASKS: Mapping[str, Task] = {
    "gsm8k": Task(
        path="openai/gsm8k",
        name="main",
        columns={"prompt": "question", "completion": "answer"},
        template="Question: {prompt}\nAnswer: {completion}",
        scorers={
            "strict": each(_same(strict_answer, gsm8k_gold)),
            "flexible": each(_same(flexible_answer, gsm8k_gold)),
            "metamath": each(_same(metamath_answer, _metamath_gold)),
        },
    ),
    "math": Task(
        path="EleutherAI/hendrycks_math",
        name=_MATH_SUBJECTS,
        columns={"prompt": "problem", "completion": "solution"},
        template="Problem: {prompt}\nSolution: {completion}",
        scorers={
            "is_equiv": each(_same(boxed_answer, _math_gold, is_equiv)),
            "metamath": each(_same(stated_answer, _math_gold, is_equiv)),
            "math_verify": ScoringRule(
                _same_value, missing=lambda: None if math_verify_available() else INSTALL
            ),
        },
    ),
    "mbpp": Task(
        path="google-research-datasets/mbpp",
        name="full",
        columns={"completion": "code"},
        template="Task: {prompt}\nPython:\n{completion}",
        shots_split="prompt",
        scorers={"pass": ScoringRule(_passes_tests, is_pass_at_k=True)},
        runs_code=True,
    ),
    "exact_match": Task(
        template="Question: {prompt}\nAnswer: {completion}",
        scorers={"exact_match": each(_exact_match), "exact_text": each(_exact_text)},
    ),
    "label": Task(
        template="Question: {prompt}\nAnswer: {completion}",
        scorers={
            "accuracy": ScoringRule(_same_label, confusion=confusion),
            "macro_f1": ScoringRule(_same_label, total=macro_f1),
        },
    ),
    "json": Task(
        template="Question: {prompt}\nAnswer: {completion}",
        scorers={
            "exact": ScoringRule(_of_json(lambda value, right: float(same(value, right.value)))),
            "fields": ScoringRule(_of_json(lambda value, right: shared_fields(value, right.value))),
            "valid": ScoringRule(_of_json(lambda *_: 1.0)),
            "schema": ScoringRule(
                _of_json(lambda value, right: float(schema_fault(value, right.schema) is None)),
                applies=lambda found: all(right_answer(one).schema is not None for one in found),
            ),
        },
    ),
    "text": Task(
        template="Question: {prompt}\nAnswer: {completion}",
        scorers={
            "chrf": each(_like_text(text_answer.chrf), missing=text_answer.missing),
            "rouge_l": each(_like_text(text_answer.rouge_l), missing=text_answer.missing),
        },
    ),
    # These two measure a loss instead of judging answers.
    "loss": Task(template="Question: {prompt}\nAnswer: {completion}"),
    "forgetting": Task(),
    # Scored by the harness of that name.
    "lm_eval": Task(),
}
