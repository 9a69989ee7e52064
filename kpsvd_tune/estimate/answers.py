"""How long answers to a task's questions take: a range by a probe of this machine."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import KpsvdTuneError
from kpsvd_tune.estimate.passes import PassTimes
from kpsvd_tune.estimate.time import STEP_RANGE
from kpsvd_tune.evaluation.evaluate import as_trained, labelled
from kpsvd_tune.evaluation.questions import build_prompts, read_questions, read_shots
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.models.loading import DTYPES
from kpsvd_tune.recipe import EvaluationRecipe, Recipe

ANSWERS_BASIS = (
    "by products of the model's own sizes, made now: from answers of one token each to answers "
    "that are all as long as they may be"
)


def prompt_lengths(task: EvaluationRecipe, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each prompt of a task that has answers to generate."""
    template = task.template or TASKS[task.task].template
    prompts, _ = build_prompts(read_questions(task), tokenizer, template, task, read_shots(task))
    return [len(each.input_ids) for each in prompts]


def answering_sizes(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int, int]]:
    """Rows, tokens of the longest prompt and most new ones of the largest batch of each task.

    Tasks without answers, and those whose rows cannot be read now, are left out.
    """
    found = []
    for each in recipe.evaluation:
        if not TASKS[each.task].scorers:
            continue
        task = as_trained(each, recipe.dataset)
        with suppress(KpsvdTuneError):
            lengths = prompt_lengths(task, tokenizer)
            rows = min(task.batch_size, len(lengths) * task.samples)
            found.append((rows, max(lengths), task.max_new_tokens))
    return found


def answering_seconds(
    skeleton: Any,
    dtype: str,
    task: EvaluationRecipe,
    lengths: list[int],
    device: torch.device,
    adapted: int = 0,
) -> tuple[float, float]:
    """Least and most seconds: a pass over the prompts of each batch, and one for every token more.

    ``adapted`` layers have adapters.
    """
    passes = PassTimes(skeleton, DTYPES[dtype], device, adapted)
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
    recipe: Recipe,
    skeleton: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    processes: int,
    adapted: int,
) -> tuple[tuple[float, float] | None, list[str]]:
    """Least and most seconds of a run's scorings, before and after, and what they rest on.

    ``adapted`` layers have adapters. None where no task has answers that can be counted; what is
    not counted is named.
    """
    least = most = 0.0
    left: list[str] = []
    is_known = False
    for name, each in labelled(recipe.evaluation).items():
        if not TASKS[each.task].scorers:
            left.append(name)
            continue
        task = as_trained(each, recipe.dataset)
        try:
            lengths = prompt_lengths(task, tokenizer)
        except KpsvdTuneError as error:
            left.append(f"{name} ({str(error).splitlines()[0]})")
            continue
        share = lengths[::processes]
        low, high = answering_seconds(skeleton, recipe.model.dtype, task, share, device, adapted)
        times = 2 if task.before else 1
        least, most, is_known = least + times * low, most + times * high, True
    basis = [f"scoring {ANSWERS_BASIS}"] if is_known else []
    if left:
        basis.append(f"the time of scoring {', '.join(left)} is not estimated")
    return ((least, most) if is_known else None), basis
