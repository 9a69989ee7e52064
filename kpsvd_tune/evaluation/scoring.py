"""From completions to scores: what a task's scorers make of them, and the figures of a score."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.completions import SETTINGS_FILE, Completion, RowId
from kpsvd_tune.evaluation.sandbox.run import Sandbox, check_sandbox
from kpsvd_tune.evaluation.tasks import TASKS, Progress, Verdict
from kpsvd_tune.report.results import Score
from kpsvd_tune.report.run import MEANS
from kpsvd_tune.storage.json_files import parse_json, read_bytes

_USUAL_K = (1, 5, 10, 25, 50, 100)


def check_code_execution(tasks: Iterable[str], sandbox: Sandbox | None) -> None:
    """Refuse tasks that run programs, before any work is done, where these may not run.

    `sandbox` is None where --allow-code-execution was not typed, and "none" for no protection.

    Raises:
        InputError: programs would run and may not, or there is no sandbox for them.
    """
    for task in tasks:
        if task in TASKS and TASKS[task].runs_code:
            if sandbox is None:
                raise InputError(
                    f"the task {task} runs programs the model wrote, and that was not allowed. "
                    "Type --allow-code-execution to run them in a sandbox."
                )
            check_sandbox(sandbox)


def missing_scorers(task: str) -> tuple[str, ...]:
    """Why a scorer of this task will be missing, one message each, with what to do about it."""
    reasons = (each.missing() for each in TASKS[task].scorers.values())
    return tuple(dict.fromkeys(why for why in reasons if why is not None))


def check_scorers(task: str) -> None:
    """Refuse a task none of whose scorers is installed, with what to do (InputError)."""
    scorers = TASKS[task].scorers.values()
    if scorers and all(each.missing() is not None for each in scorers):
        raise InputError("; ".join(missing_scorers(task)))


def score_completions(
    task: str,
    completions: Sequence[Completion],
    *,
    sandbox: Sandbox | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """All scores of a task on its completions, without a model; `progress` counts programs.

    Returns:
        One score for each scorer of the task in `TASKS` that is there on this machine (pass@k: one
        for each usual k up to the number of samples). n is the number of questions, however many
        samples each has; the standard error is that of a share, sqrt(value (1 - value) / n), or of
        a mean where a scorer gives parts of a point.

    Raises:
        InputError: the task is unknown, or it runs programs and may or can not.
        DataError: there is no completion, or a gold does not fit the task.
    """
    scored = [name for name, each in TASKS.items() if each.scorers]
    if task not in scored:
        raise InputError(f"the task must be one of {', '.join(scored)}, got {task!r}.")
    check_code_execution([task], sandbox)
    check_scorers(task)
    if not completions:
        raise DataError(
            f"there is no completion to score for the task {task}: expected at least 1."
        )
    scores = []
    for name, scorer in TASKS[task].scorers.items():
        if scorer.missing() is not None or not scorer.applies(completions):
            continue
        if scorer.total is not None:
            scores.append(scorer.total(completions))
            continue
        verdicts = scorer.judge(completions, sandbox, progress)
        if scorer.is_pass_at_k:
            counts = _counts(completions, verdicts)
            most = min(total for total, _ in counts)
            for k in sorted({k for k in _USUAL_K if k <= most} | {most}):
                shares = [pass_at_k(total, right, k) for total, right in counts]
                scores.append(_score(f"{name}@{k}", shares, verdicts))
        else:
            means = _means(completions, verdicts)
            score = _score(name, list(means.values()), verdicts)
            table = None if scorer.confusion is None else scorer.confusion(completions)
            points = {str(row): value for row, value in means.items()}
            scores.append(replace(score, confusion=table, points=points))
    return scores


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of the samples, drawn without putting back, hold a right one; k in [1, n].

    Unbiased: 1 - C(n - num_correct, k) / C(n, k), n samples. Source: Chen et al. 2021, section 2.1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be 1 to {num_samples}, the number of samples, got {k}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def stored_task(file: Path) -> str | None:
    """The task of stored completions, where the evaluation left its settings beside them."""
    try:
        task = parse_json(read_bytes(file.parent / SETTINGS_FILE)).get("task")
    except (OSError, ValueError):
        return None
    return task if isinstance(task, str) and task in TASKS and TASKS[task].scorers else None


def _counts(
    completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> list[tuple[int, int]]:
    """(samples, right ones) of each question."""
    pairs = list(zip(completions, verdicts, strict=True))
    right = Counter(each.id for each, verdict in pairs if verdict.is_correct)
    return [(total, right[row]) for row, total in Counter(each.id for each, _ in pairs).items()]


def _means(completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> dict[RowId, float]:
    """The mean points of each question's samples, by the question's id."""
    points: dict[RowId, list[float]] = {}
    for completion, verdict in zip(completions, verdicts, strict=True):
        points.setdefault(completion.id, []).append(verdict.points)
    means = {row: math.fsum(each) / len(each) for row, each in points.items()}
    # Several processes answer in an order of their own.
    return dict(sorted(means.items(), key=lambda one: (len(str(one[0])), str(one[0]))))


def _score(scorer: str, shares: Sequence[float], verdicts: Sequence[Verdict]) -> Score:
    value = math.fsum(shares) / len(shares)
    # Rounding may leave a mean of ones above 1, and no standard error below 0.
    value = min(max(value, 0.0), 1.0)
    return Score(
        scorer=scorer,
        value=value,
        n=len(shares),
        stderr=_stderr(scorer, value, shares),
        unextractable=sum(not each.is_extracted for each in verdicts),
    )


def _stderr(scorer: str, value: float, shares: Sequence[float]) -> float:
    """Of a share by its value, of a mean of parts by their spread."""
    if scorer not in MEANS or len(shares) < 2:
        return math.sqrt(value * (1 - value) / len(shares))
    return statistics.stdev(shares) / math.sqrt(len(shares))
