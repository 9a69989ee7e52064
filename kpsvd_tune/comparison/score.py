"""Judges the model of a trial by a task's score: its answers to rows that it was not trained on.

Answers are kept beside the trial as they are written, so that a scoring that is stopped goes on,
and what every question was worth is kept in the trial's row, so that models are compared question
by question.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from kpsvd_tune.comparison.kept_base import KeptBase
from kpsvd_tune.comparison.setup import Setup
from kpsvd_tune.comparison.trial import Material, adapted
from kpsvd_tune.data.read.sources import shared_settings
from kpsvd_tune.errors import CheckpointError, InputError
from kpsvd_tune.evaluation.evaluate import Scorer, as_trained, conditions
from kpsvd_tune.evaluation.questions import (
    answer_tail,
    read_questions,
    read_shots,
    stop_strings,
)
from kpsvd_tune.evaluation.scoring import check_scorers
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.events import Events
from kpsvd_tune.models import load_tokenizer
from kpsvd_tune.processes import device
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe, Recipe
from kpsvd_tune.report.comparison import TrialScore
from kpsvd_tune.storage.durable import make_folder
from kpsvd_tune.storage.locks import lock_folder

_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Questions:
    """What all models of a comparison are asked."""

    task: EvaluationRecipe
    dataset: DatasetRecipe  # with the template that the rows turned out to take
    chat_template: str | None  # that the rows were written with
    asked: str  # in words, with a hash of the questions


@dataclass(frozen=True)
class Scoring:
    """One model to be scored: that of a trial, or the base model."""

    questions: Questions
    setup: Setup | None  # None for the base model
    folder: Path  # of the answers
    name: str  # for messages


def scored_task(recipe: Recipe, name: str) -> EvaluationRecipe:
    """What ``--score`` asks: the recipe's own task of that name, else held-out rows.

    Those are compare.test, else a file of dataset.validation.

    Raises:
        InputError: No such task, one that runs programs or measures a loss, or no rows for it.
    """
    known = [each for each, task in TASKS.items() if task.scorers and not task.runs_code]
    if name not in known:
        why = ""
        if name in TASKS and TASKS[name].runs_code:
            why = "; it runs programs: score the adapter of one trial with `kpsvd-tune eval`"
        raise InputError(f"--score: got {name!r}; expected one of {', '.join(known)}{why}")
    check_scorers(name)
    own = [each for each in recipe.evaluation if each.task == name]
    if own:
        return own[0].model_copy(update={"before": False})
    assert recipe.dataset is not None
    held_out = recipe.dataset.validation
    path = recipe.compare.test or (held_out if isinstance(held_out, str) else None)
    if path is None:
        raise InputError(
            f"--score {name}: no rows to ask; name a file of rows that are not trained on as "
            f"compare.test=FILE, or in the recipe as evaluation: [{{task: {name}, path: FILE}}]"
        )
    # The user's rows are as those that are trained on.
    columns = shared_settings(recipe.dataset).columns
    task = EvaluationRecipe.model_validate({"task": name, "path": path, "columns": columns})
    task.stands_at("dataset.")
    return task


def make_questions(
    task: EvaluationRecipe, dataset: DatasetRecipe, chat_template: str | None
) -> Questions:
    """Read the questions once, to tell them from others; DataError where they cannot be read."""
    full = as_trained(task, dataset)
    questions = read_questions(full)
    digest = hashlib.sha256()
    for each in (*questions, *read_shots(full, questions)):
        digest.update(repr((each.id, each.prompt, each.gold)).encode())
        if each.system or each.tools:
            digest.update(repr((each.system, each.tools)).encode())
    if full.stop is not None:
        digest.update(repr(full.stop).encode())
    template = full.template or TASKS[full.task].template
    # Answers of earlier versions ended otherwise there.
    if tail := answer_tail(full, template):
        digest.update(repr(tail).encode())
    if stop_strings(full, template, questions) != stop_strings(full, template):
        digest.update(b"not ended at the template's beginning")
    asked = f"{conditions(full)}, questions {digest.hexdigest()[:8]}"
    return Questions(full, dataset, chat_template, asked)


def score_model(scoring: Scoring, material: Material, base: KeptBase, events: Events) -> TrialScore:
    """Answer what is not answered yet and judge all answers, in the process of a worker.

    FolderInUseError: another process scores the same model.
    """
    make_folder(scoring.folder)
    with lock_folder(scoring.folder):
        return _score(scoring, material, base, events)


def _score(scoring: Scoring, material: Material, base: KeptBase, events: Events) -> TrialScore:
    began = time.monotonic()
    questions, task = scoring.questions, scoring.questions.task
    tokenizer: Any = load_tokenizer(material.source)
    tokenizer.chat_template = questions.chat_template
    model = base.fresh() if scoring.setup is None else _trained(scoring.setup, material, base)
    scorer = Scorer(tokenizer, questions.dataset, device(), events, None)
    scores = scorer.score(model, task, scoring.folder, set_aside=True)
    judged = next((each for each in scores if each.points is not None), None)
    if judged is None or judged.points is None:
        raise InputError(f"--score {task.task}: none of its scorers judges answers one by one")
    return TrialScore(
        task=task.task,
        scorer=judged.scorer,
        asked=questions.asked,
        value=judged.value,
        shares=tuple(judged.points[str(each.id)] for each in read_questions(task)),
        unextractable=judged.unextractable,
        seconds=time.monotonic() - began,
    )


def _trained(setup: Setup, material: Material, base: KeptBase) -> Any:
    """The model of a finished trial: started as it was, with the weights that it saved.

    Started anew, for what some methods take out of the base or draw is not in their file.
    """
    file = setup.folder / "adapter" / _ADAPTER
    if not file.is_file():
        raise CheckpointError(
            f"{file} is gone, so the model of this trial cannot be scored; remove the folder "
            f"{setup.folder} and the trial's line in results.jsonl, and it is run again"
        )
    model, _, _ = adapted(setup, material, base.fresh())
    set_peft_model_state_dict(model, load_file(str(file)))
    return model
