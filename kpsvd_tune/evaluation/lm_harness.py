"""Tasks of the Language Model Evaluation Harness (lm-eval), scored by its own code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import DataError, InputError, KpsvdTuneError, some_of
from kpsvd_tune.recipe import EvaluationRecipe
from kpsvd_tune.report.results import Score
from kpsvd_tune.storage.paths import expand

INSTALL = (
    "the task lm_eval needs the package lm-eval; install it with: pip install 'kpsvd-tune[lm-eval]'"
)
# Metrics that are a mean of points from 0 to 1; others have scales of their own.
_POINTS = ("acc", "acc_norm", "exact_match", "em", "f1")
_BOOTSTRAP = 1000


def task_names(recipe: EvaluationRecipe) -> list[str]:
    """The harness's tasks that a section names."""
    return [recipe.name] if isinstance(recipe.name, str) else list(recipe.name or ())


def check_harness(recipe: EvaluationRecipe) -> None:
    """Find now what would stop the scoring after a training.

    Raises:
        InputError: lm-eval is not installed, or knows no such task.
    """
    manager = _manager(recipe)
    known = manager.all_tasks
    if unknown := [name for name in task_names(recipe) if name not in known]:
        own = recipe.written("path")
        where = f"nor in {recipe.path}" if recipe.path else f"and {own} names no folder"
        raise InputError(
            f"evaluation of lm_eval: lm-eval knows no task {some_of(unknown)}, {where}; expected "
            f"names as `lm-eval ls tasks` shows them, or a folder of task files in {own}"
        )


def harness_scores(
    model: Any, tokenizer: PreTrainedTokenizerBase, recipe: EvaluationRecipe
) -> tuple[list[Score], tuple[str, ...]]:
    """Score a model on the tasks; gives with the scores the metrics that were left out.

    Raises:
        InputError: lm-eval is not installed.
        DataError: A task cannot be run, as where its rows cannot be read.
    """
    manager = _manager(recipe)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=recipe.batch_size),
            tasks=task_names(recipe),
            num_fewshot=recipe.shots,
            limit=recipe.limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            task_manager=manager,
            apply_chat_template=recipe.template == "chat",
        )
    except KpsvdTuneError:
        raise
    except Exception as error:  # of any task's code, data set or metric
        raise DataError(
            f"lm-eval ended in an error on {some_of(task_names(recipe))}: {type(error).__name__}: "
            f"{str(error)[:300]}; does `lm-eval run` score a model on it?"
        ) from error
    return _read(found)


def _manager(recipe: EvaluationRecipe) -> Any:
    if find_spec("lm_eval") is None:
        raise InputError(INSTALL)
    folder = None if recipe.path is None else str(expand(str(recipe.path)))
    return _index(folder, tuple(task_names(recipe)))


@cache
def _index(folder: str | None, names: tuple[str, ...]) -> Any:
    """The tasks that are known; the harness's own only where one of those named is among them.

    Its thousands of files take a minute to read.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=folder)


def _read(found: Mapping[str, Any]) -> tuple[list[Score], tuple[str, ...]]:
    scores, left_out = [], []
    for task, values in found["results"].items():
        number = _num_samples(found, task)
        for key, value in values.items():
            metric, comma, rule = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            name = f"{task}: {metric}" + (f" ({rule})" if rule != "none" else "")
            if metric not in _POINTS or number < 1:
                left_out.append(f"{name} {value}")
                continue
            stderr = values.get(f"{metric}_stderr,{rule}")
            if not isinstance(stderr, float) or not math.isfinite(stderr):
                stderr = math.sqrt(value * (1 - value) / number)
            scores.append(Score(name, float(value), number, stderr))
    return scores, tuple(left_out)


def _num_samples(found: Mapping[str, Any], task: str) -> int:
    """The questions of a task; of a group those of all tasks below it."""
    known = found.get("n-samples", {}).get(task)
    if known is not None:
        return int(known.get("effective", 0))
    return sum(_num_samples(found, each) for each in found.get("group_subtasks", {}).get(task, ()))
