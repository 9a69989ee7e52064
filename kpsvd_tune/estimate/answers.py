"""How long answers to a task's questions take: a range by a probe of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import KpsvdTuneError
from kpsvd_tune.estimate.passes import PassTimes
from kpsvd_tune.estimate.time import STEP_RANGE
from kpsvd_tune.evaluation.evaluate import as_trained, doubt_of, labelled
from kpsvd_tune.evaluation.questions import Question, build_prompts, read_questions, read_shots
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.models.loading import DTYPES
from kpsvd_tune.recipe import EvaluationRecipe, Recipe

ANSWERS_BASIS = (
    "by products of the model's own sizes, made now: from answers of one token each to answers "
    "that are all as long as they may be"
)


def prompt_lengths(task: EvaluationRecipe, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each prompt of a task that has answers to generate."""
    return _prompt_lengths(task, read_questions(task), tokenizer)


def _prompt_lengths(
    task: EvaluationRecipe, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    template = task.template or TASKS[task.task].template
    shots = read_shots(task, questions)
    prompts, _ = build_prompts(questions, tokenizer, template, task, shots)
    return [len(each.input_ids) for each in prompts]


# A task as it is asked in a run, and the tokens of each of its prompts.
AskedTask = tuple[EvaluationRecipe, list[int]]


def asked_tasks(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, note: Callable[[str], None]
) -> tuple[list[AskedTask], list[str]]:
    """The tasks of a run that have answers to generate, and the names of the others.

    Those whose rows cannot be read now are among the others, with the reason. `note` is told what
    looks wrong about the rows of a task.
    """
    found: list[AskedTask] = []
    left = []
    for name, each in labelled(recipe.evaluation).items():
        if not TASKS[each.task].scorers:
            left.append(name)
            continue
        task = as_trained(each, recipe.dataset)
        try:
            questions = read_questions(task)
            found.append((task, _prompt_lengths(task, questions, tokenizer)))
        except KpsvdTuneError as error:
            left.append(f"{name} ({str(error).splitlines()[0]})")
            continue
        if (doubt := doubt_of(task, questions)) is not None:
            note(doubt)
    return found, left


def batch_rows(task: EvaluationRecipe, lengths: list[int]) -> int:
    """Rows of a task's largest batch."""
    return min(task.batch_size, len(lengths) * task.samples)


def answering_seconds(
    passes: PassTimes, task: EvaluationRecipe, lengths: list[int]
) -> tuple[float, float]:
    """Least and most seconds: a pass over the prompts of each batch, and one for every token more.

    ``lengths`` are tokens of the prompts.
    """
    low = high = 0.0
    # As `generate_completions` puts them together.
    rows = sorted((each for each in lengths for _ in range(task.samples)), reverse=True)
    for start in range(0, len(rows), task.batch_size):
        batch = rows[start : start + task.batch_size]
        reading = passes.seconds(len(batch), batch[0])
        low += reading
        high += reading + (task.max_new_tokens - 1) * passes.seconds(len(batch), 1)
    return STEP_RANGE[0] * low, STEP_RANGE[1] * high


def scoring_seconds(
    tasks: list[AskedTask],
    skeleton: Any,
    dtype: str,
    device: torch.device,
    processes: int,
    adapted: int,
) -> tuple[float, float] | None:
    """Least and most seconds of a run's scorings, before and after; None without a task.

    ``adapted`` layers have adapters.
    """
    passes = PassTimes(skeleton, DTYPES[dtype], device, adapted)
    least = most = 0.0
    for task, lengths in tasks:
        low, high = answering_seconds(passes, task, lengths[::processes])
        times = 2 if task.before else 1
        least, most = least + times * low, most + times * high
    return (least, most) if tasks else None
