"""How long answers to a task's questions take: a range by a probe of this machine."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import KpsvdTuneError
from kpsvd_tune.estimate.memory import base_bytes
from kpsvd_tune.estimate.time import STEP_RANGE, measure_speed
from kpsvd_tune.evaluation.evaluate import as_trained, labelled
from kpsvd_tune.evaluation.questions import build_prompts, read_questions, read_shots
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.models.loading import DTYPES
from kpsvd_tune.recipe import EvaluationRecipe, Recipe

ANSWERS_BASIS = (
    "by the speed that this machine shows now: from answers of one token each to answers that are "
    "all as long as they may be"
)


def prompt_lengths(task: EvaluationRecipe, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each prompt of a task that has answers to generate."""
    template = task.template or TASKS[task.task].template
    prompts, _ = build_prompts(read_questions(task), tokenizer, template, task, read_shots(task))
    return [len(each.input_ids) for each in prompts]


def answering_seconds(
    skeleton: Any, dtype: str, task: EvaluationRecipe, lengths: list[int], device: torch.device
) -> tuple[float, float]:
    """Least and most seconds: every token takes a product with all weights, or their reading."""
    numel = sum(each.numel() for each in skeleton.parameters())
    speed = measure_speed(device, DTYPES[dtype])
    reading = base_bytes(skeleton, dtype) / speed.traffic
    reads = task.samples * sum(lengths) * numel / speed.multiply_adds
    batches = -(-len(lengths) * task.samples // task.batch_size)
    together = min(task.batch_size, len(lengths) * task.samples)
    token = max(reading, together * numel / speed.multiply_adds)
    low, high = reads + batches * token, reads + batches * task.max_new_tokens * token
    return STEP_RANGE[0] * low, STEP_RANGE[1] * high


def scoring_seconds(
    recipe: Recipe,
    skeleton: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    processes: int,
) -> tuple[tuple[float, float] | None, list[str]]:
    """Least and most seconds of a run's scorings, before and after, and what they rest on.

    None where no task has answers that can be counted; what is not counted is named.
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
        low, high = answering_seconds(skeleton, recipe.model.dtype, task, share, device)
        times = 2 if task.before else 1
        least, most, is_known = least + times * low, most + times * high, True
    basis = [f"scoring {ANSWERS_BASIS}"] if is_known else []
    if left:
        basis.append(f"the time of scoring {', '.join(left)} is not estimated")
    return ((least, most) if is_known else None), basis
