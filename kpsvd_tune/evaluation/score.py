"""Scoring a model on tasks: those of a recipe around training, or one of `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.evaluation.evaluate import (
    COMPLETIONS_FILE,
    check_task,
    conditions,
    rows_source,
)
from kpsvd_tune.evaluation.evaluate import evaluate as run_task
from kpsvd_tune.evaluation.sandbox.run import CodePermission
from kpsvd_tune.evaluation.scoring import missing_scorers
from kpsvd_tune.events import Events
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe
from kpsvd_tune.report.results import Score
from kpsvd_tune.report.run import as_mapping, score_text
from kpsvd_tune.runs.find import Loaded


def labelled(tasks: Sequence[EvaluationRecipe]) -> dict[str, EvaluationRecipe]:
    """Tasks by the name of their scores: the task's, numbered from the second of a kind on."""
    named: dict[str, EvaluationRecipe] = {}
    for task in tasks:
        number = sum(each.task == task.task for each in named.values()) + 1
        named[task.task if number == 1 else f"{task.task}-{number}"] = task
    return named


def check_tasks(tasks: Sequence[EvaluationRecipe], dataset: DatasetRecipe | None) -> None:
    """Refuse now what would stop the scoring after a training.

    Raises:
        InputError: Worked examples are wanted, and there are no rows to take them from.
        DataError: A task's rows or text cannot be read.
    """
    for task in tasks:
        check_task(as_trained(task, dataset))


class Scorer:
    """Scores a model on tasks and reports progress.

    Args:
        tokenizer: The model's tokenizer.
        dataset: What the model was trained on, whose template and columns hold where a task has
            none; None: the tasks' own.
        place: Device to compute on.
        events: Told of progress and scores.
        permission: To run programs, which mbpp needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: DatasetRecipe | None,
        place: torch.device,
        events: Events,
        permission: CodePermission,
    ) -> None:
        self._tokenizer = tokenizer
        self._dataset = dataset
        self._place = place
        self._events = events
        self._permission = permission

    def score_all(
        self, model: Any, tasks: Mapping[str, EvaluationRecipe], folder: Path
    ) -> dict[str, list[Score]]:
        """Scores by name, told as they are found; completions go to a folder of the task's name.

        Completions there that another model wrote, as those of an earlier run in this place, are
        set aside.
        """
        found = {}
        for name, task in tasks.items():
            found[name] = self.score(model, task, folder / name, set_aside=True)
            for score in found[name]:
                self._events.note(f"{score.scorer}: {score_text(score.scorer, score.to_dict())}")
        return found

    def conditions(self, tasks: Mapping[str, EvaluationRecipe]) -> dict[str, str]:
        """How each task was asked, in words."""
        return {name: conditions(as_trained(task, self._dataset)) for name, task in tasks.items()}

    def score(
        self, model: Any, task: EvaluationRecipe, folder: Path, *, set_aside: bool = False
    ) -> list[Score]:
        """Run one task; an interrupted one goes on from the completions in ``folder``."""
        task = as_trained(task, self._dataset)
        self._events.stage(f"scoring {task.task}: {conditions(task)}")
        model.to(self._place)
        scores = run_task(
            model,
            self._tokenizer,
            task,
            folder,
            self._events,
            permission=self._permission,
            set_aside=set_aside,
        )
        self._events.end_progress()
        for note in missing_scorers(task.task):
            self._events.note(note)
        return scores

    def result(self, loaded: Loaded, task: EvaluationRecipe, folder: Path) -> dict[str, Any]:
        """Score one task, and say what its scores are of.

        Args:
            loaded: The model.
            task: The task with its data and sizes.
            folder: Takes the completions.

        Returns:
            ``{"scores": {scorer: {"value", "n", "stderr", "unextractable"}}}``, shares with their
            interval, the task, where the rows are from, how they were asked, and where the
            completions lie.
        """
        scores = as_mapping(self.score(loaded.model, task, folder))
        asked = self.conditions({task.task: task})[task.task]
        result = {"task": task.task, "file": rows_source(task), "scores": scores}
        if (other := loaded.other_base) is not None:
            self._events.note(f"scored {other}")
            # The conditions stand in results.json and in the card of a run.
            asked += "; on another base model than the adapter's"
            result["other_base"] = f"scored {other}"
        if (file := folder / COMPLETIONS_FILE).exists():
            result["completions"] = str(file)
        return {**result, "conditions": asked}


def as_trained(task: EvaluationRecipe, dataset: DatasetRecipe | None) -> EvaluationRecipe:
    """The task with what it leaves open taken from the training."""
    if dataset is None:
        return task
    update: dict[str, Any] = {
        "template": task.template or dataset.template,
        "learn": task.learn or dataset.learn,
    }
    if task.task in ("exact_match", "loss") and not task.columns:
        # They have no columns of their own; those of the training are the likeliest.
        update["columns"] = dataset.columns
    return task.model_copy(update=update)
