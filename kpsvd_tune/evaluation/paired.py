"""Two sets of stored answers to the same questions, compared question by question."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.completions import Completion, read_completions
from kpsvd_tune.evaluation.scoring import stored_task
from kpsvd_tune.evaluation.tasks import TASKS, ScoringRule
from kpsvd_tune.report.results import PairedScore


def paired_scores(first: Path, second: Path) -> dict[str, PairedScore]:
    """The difference of every scorer between two files of completions, second minus first.

    Only questions that both files answer, in the same words and with the same gold, are compared:
    equal row numbers alone may be those of different files. The standard error is
    that of the mean of their differences: what makes a question hard for both falls out of it.

    Raises:
        DataError: The files are of different tasks, or of one whose programs would have to run
            again, or share no question; or one cannot be read.
    """
    tasks = [stored_task(file) for file in (first, second)]
    task = tasks[0]
    if task is None or tasks[0] != tasks[1]:
        names = [each or "an unknown task" for each in tasks]
        raise DataError(f"the answers are of {names[0]} and of {names[1]}")
    if TASKS[task].runs_code:
        raise DataError(f"{task} would run the programs of both again")
    answers = [_by_question(read_completions(file)) for file in (first, second)]
    shared = [
        key
        for key, own in answers[0].items()
        if key in answers[1] and _asks(answers[1][key][0]) == _asks(own[0])
    ]
    if not shared:
        raise DataError("the answers have no question in the same words in common")
    together = [each for side in answers for key in shared for each in side[key]]
    return {
        name: _paired(rule, answers, shared)
        for name, rule in TASKS[task].scorers.items()
        # A figure of all answers together has no difference at one question.
        if rule.total is None and rule.missing() is None and rule.applies(together)
    }


def _asks(completion: Completion) -> tuple[str, Any]:
    return completion.prompt, completion.gold


def _by_question(completions: Sequence[Completion]) -> dict[str, list[Completion]]:
    found: dict[str, list[Completion]] = defaultdict(list)
    for each in completions:
        found[str(each.id)].append(each)
    return found


def _paired(
    rule: ScoringRule, answers: Sequence[dict[str, list[Completion]]], shared: Sequence[str]
) -> PairedScore:
    shares = [_shares(rule, [side[key] for key in shared]) for side in answers]
    differences = [after - before for before, after in zip(*shares, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    spread = math.fsum((each - mean) ** 2 for each in differences)
    return PairedScore(
        difference=mean,
        stderr=math.sqrt(spread / (n - 1) / n) if n > 1 else None,
        n=n,
        first_better=sum(each < 0 for each in differences),
        second_better=sum(each > 0 for each in differences),
    )


def _shares(rule: ScoringRule, questions: Sequence[Sequence[Completion]]) -> list[float]:
    """The mean of what the samples of each question are worth."""
    # Judged all at once, for a judge may start a process.
    verdicts = iter(rule.judge([each for samples in questions for each in samples], None, None))
    return [
        math.fsum(next(verdicts).points for _ in samples) / len(samples) for samples in questions
    ]
