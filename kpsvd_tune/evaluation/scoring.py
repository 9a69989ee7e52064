"""From completions to scores: which scorers a task has, and what each makes of a completion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.completions import Completion, RowId, read_completions
from kpsvd_tune.evaluation.math_answer import boxed_answer, is_equiv, stated_answer
from kpsvd_tune.evaluation.math_judge import INSTALL, judge_by_value, math_verify_available
from kpsvd_tune.evaluation.numeric_answer import (
    flexible_answer,
    gsm8k_gold,
    last_number,
    metamath_answer,
    plain_text,
    strict_answer,
)
from kpsvd_tune.evaluation.permission import NO_CODE, CodePermission
from kpsvd_tune.evaluation.program_answer import pass_at_k, program_text, program_with_tests
from kpsvd_tune.evaluation.sandbox.run import Limits, run_programs
from kpsvd_tune.report.results import Score
from kpsvd_tune.storage.json_files import parse_json, read_bytes

TASKS = ("gsm8k", "math", "mbpp", "exact_match")
_USUAL_K = (1, 5, 10, 25, 50, 100)


@dataclass(frozen=True)
class Verdict:
    """What a scorer made of one completion; without an answer in it it is wrong."""

    is_correct: bool
    is_extracted: bool = True


TextScorer = Callable[[str, str], Verdict]


def missing_scorers(task: str) -> tuple[str, ...]:
    """Why a scorer of this task will be missing, one message each, with what to do about it."""
    return (INSTALL,) if task == "math" and not math_verify_available() else ()


def score_completions(
    task: str,
    completions: Sequence[Completion],
    *,
    permission: CodePermission = NO_CODE,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """All scores of a task on its completions.

    Args:
        task: "gsm8k" (strict, flexible, metamath), "math" (is_equiv, metamath, and math_verify
            where it is installed), "mbpp" (pass@1 and pass@k up to the number of samples) or
            "exact_match" (exact_match, exact_text).
        completions: several samples of a prompt count as one question.
        permission: to run programs, which mbpp needs.
        limits: what each program may use.
        progress: called with (done, total) programs.

    Returns:
        One score a scorer; n is the number of questions and the standard error that of a share,
        sqrt(value (1 - value) / n).

    Raises:
        InputError: the task is unknown, or it runs programs and may not.
        DataError: there is no completion, or a gold does not fit the task.
    """
    if task not in TASKS:
        raise InputError(f"the task must be one of {', '.join(TASKS)}, got {task!r}.")
    if not completions:
        raise DataError(
            f"there is no completion to score for the task {task}: expected at least 1."
        )
    if task == "mbpp":
        sandbox = permission.for_task(task)
        programs = [program_with_tests(each.completion, each.gold) for each in completions]
        results = run_programs(programs, sandbox=sandbox, limits=limits, progress=progress)
        verdicts = [
            Verdict(
                result.passed,
                result.status != "invalid" and bool(program_text(each.completion).strip()),
            )
            for result, each in zip(results, completions, strict=True)
        ]
        return _pass_scores(completions, verdicts)
    scorers = _TEXT_SCORERS[task]
    scores = [
        _share(name, completions, [scorer(c.completion, _text(c)) for c in completions])
        for name, scorer in scorers.items()
    ]
    if task == "math" and math_verify_available():
        judged = judge_by_value([(_text(each), each.completion) for each in completions])
        verdicts = [Verdict(is_correct, is_extracted) for is_extracted, is_correct in judged]
        scores.append(_share("math_verify", completions, verdicts))
    return scores


def rescore(
    file: Path,
    task: str,
    *,
    permission: CodePermission = NO_CODE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Score stored completions again, without a model.

    Args:
        file: rows {id, prompt, completion, gold}, one a line.
        task: whose scorers to use.
        permission: to run programs, which mbpp needs.
        progress: called with (done, total) programs run.

    Raises:
        InputError: the task is unknown, or it runs programs and may not.
        DataError: the file cannot be read, holds no row, or its gold does not fit the task.
    """
    return score_completions(
        task,
        read_completions(file),
        permission=permission,
        progress=progress,
    )


def stored_task(file: Path) -> str | None:
    """The task that stored completions answer, where the evaluation left word of it beside them."""
    try:
        settings = parse_json(read_bytes(file.parent / "evaluation.json"))
    except (OSError, ValueError):
        return None
    task = settings.get("task")
    return task if isinstance(task, str) and task in TASKS else None


def _text(completion: Completion) -> str:
    gold = completion.gold
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        return str(gold)
    if not isinstance(gold, str):
        raise DataError(
            f"the gold of the completion with id {completion.id!r} is {str(gold)[:60]!r}. Expected "
            "a text; was this file written for another task?"
        )
    return gold


def _compare(extract: Callable[[str], Any], of_gold: Callable[[str], Any]) -> TextScorer:
    """A scorer that extracts an answer from the completion and compares it with the gold's."""

    def score(completion: str, gold: str) -> Verdict:
        answer = extract(completion)
        return Verdict(answer is not None and answer == of_gold(gold), answer is not None)

    return score


def _metamath_gold(gold: str) -> float | None:
    answer = gsm8k_gold(gold)
    try:
        return None if answer is None else float(answer)
    except ValueError:
        return None


def _compare_math(extract: Callable[[str], str | None]) -> TextScorer:
    def score(completion: str, gold: str) -> Verdict:
        answer, right = extract(completion), boxed_answer(gold)
        if answer is None:
            return Verdict(False, False)
        return Verdict(is_equiv(answer, gold if right is None else right))

    return score


def _exact_match(completion: str, gold: str) -> Verdict:
    """By the last number of both where the gold holds one, else by the text."""
    if (right := last_number(gold)) is None:
        return _exact_text(completion, gold)
    answer = last_number(completion)
    return Verdict(answer == right, answer is not None)


def _exact_text(completion: str, gold: str) -> Verdict:
    answer = plain_text(completion)
    return Verdict(answer == plain_text(gold) and bool(answer), bool(answer))


_TEXT_SCORERS: Mapping[str, Mapping[str, TextScorer]] = {
    "gsm8k": {
        "strict": _compare(strict_answer, gsm8k_gold),
        "flexible": _compare(flexible_answer, gsm8k_gold),
        "metamath": _compare(metamath_answer, _metamath_gold),
    },
    "math": {
        "is_equiv": _compare_math(boxed_answer),
        "metamath": _compare_math(stated_answer),
    },
    "exact_match": {"exact_match": _exact_match, "exact_text": _exact_text},
}


def _by_question(
    completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> list[list[Verdict]]:
    questions: dict[RowId, list[Verdict]] = defaultdict(list)
    for completion, verdict in zip(completions, verdicts, strict=True):
        questions[completion.id].append(verdict)
    return list(questions.values())


def _share(scorer: str, completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> Score:
    questions = _by_question(completions, verdicts)
    shares = [sum(each.is_correct for each in samples) / len(samples) for samples in questions]
    return _score(scorer, shares, verdicts)


def _pass_scores(completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> list[Score]:
    questions = _by_question(completions, verdicts)
    most = min(len(samples) for samples in questions)
    counts = [(len(samples), sum(each.is_correct for each in samples)) for samples in questions]
    return [
        _score(f"pass@{k}", [pass_at_k(n, correct, k) for n, correct in counts], verdicts)
        for k in sorted({k for k in _USUAL_K if k <= most} | {most})
    ]


def _score(scorer: str, shares: Sequence[float], verdicts: Sequence[Verdict]) -> Score:
    value = math.fsum(shares) / len(shares)
    # Rounding may leave a mean of ones above 1, and no standard error below 0.
    value = min(max(value, 0.0), 1.0)
    return Score(
        scorer=scorer,
        value=value,
        n=len(shares),
        stderr=math.sqrt(value * (1 - value) / len(shares)),
        unextractable=sum(not each.is_extracted for each in verdicts),
    )
