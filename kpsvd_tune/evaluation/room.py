"""How many tokens an answer may have, where nobody says it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.evaluation.completions import COMPLETIONS_FILE, SETTINGS_FILE
from kpsvd_tune.evaluation.evaluate import as_trained
from kpsvd_tune.evaluation.questions import answer_tail, read_questions
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe
from kpsvd_tune.storage.json_files import parse_json, read_bytes

_MULTIPLE = 8


def room(longest: int) -> int:
    """Most tokens of an answer: somewhat more than `longest`, those of the longest right one."""
    return -(-(longest + longest // 4 + 8) // _MULTIPLE) * _MULTIPLE


def with_room(
    task: EvaluationRecipe,
    dataset: DatasetRecipe | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> EvaluationRecipe:
    """The task with `max_new_tokens` by its labels, where that was left open and labels are asked.

    An evaluation that was begun in `folder` goes on with what it began with.

    Raises:
        DataError: As of :func:`read_questions`.
    """
    if task.task != "label" or "max_new_tokens" in task.model_fields_set:
        return task
    most = _begun(folder)
    if most is None:
        read = as_trained(task, dataset)
        labels = read_questions(read)[0].gold["labels"]
        tail = answer_tail(read, read.template or TASKS[read.task].template)
        texts = [f"{each}\n{tail}" if tail else each for each in labels]
        tokens = [len(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in texts]
        most = room(max(tokens) + 1)  # and the end token
    return task.model_copy(update={"max_new_tokens": most})


def _begun(folder: Path) -> int | None:
    """The limit of the answers in a folder; None where there are none, or nothing tells it."""
    if not (folder / COMPLETIONS_FILE).exists():
        return None
    try:
        known = parse_json(read_bytes(folder / SETTINGS_FILE))["max_new_tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if isinstance(known, int) and known > 0 else None
