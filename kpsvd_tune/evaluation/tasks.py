"""The tasks: where their rows come from, and what of a row is asked and compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kpsvd_tune.data import read_examples
from kpsvd_tune.data.encode.format import Chat, Pair
from kpsvd_tune.data.read.sources import load_rows
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.completions import RowId
from kpsvd_tune.evaluation.numeric_answer import gsm8k_gold
from kpsvd_tune.recipe import EvaluationRecipe

Message = Mapping[str, Any]


@dataclass(frozen=True)
class TaskSource:
    """Where a task's rows are when the recipe names no file, and how they are written."""

    path: str | None
    name: str | tuple[str, ...] | None
    columns: Mapping[str, str]
    template: str
    shots_split: str = "train"


SOURCES: Mapping[str, TaskSource] = {
    "gsm8k": TaskSource(
        "openai/gsm8k",
        "main",
        {"prompt": "question", "completion": "answer"},
        "Question: {prompt}\nAnswer: {completion}",
    ),
    "math": TaskSource(
        "EleutherAI/hendrycks_math",
        (
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ),
        {"prompt": "problem", "completion": "solution"},
        "Problem: {prompt}\nSolution: {completion}",
    ),
    "mbpp": TaskSource(
        "google-research-datasets/mbpp",
        "full",
        {"completion": "code"},
        "Task: {prompt}\nPython:\n{completion}",
        "prompt",
    ),
    "exact_match": TaskSource(None, None, {}, "Question: {prompt}\nAnswer: {completion}"),
    "loss": TaskSource(None, None, {}, "Question: {prompt}\nAnswer: {completion}"),
}
# The first and last task_id of each split, for local files, which hold all splits together.
_MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}


@dataclass(frozen=True)
class Question:
    """One row of a task.

    Attributes:
        id: its id in the source, or its number from 0.
        prompt: the question's text, or chat messages up to a user's.
        answer: the right answer as a model would write it, for worked examples.
        gold: what scorers compare with.
        system: the row's system prompt.
        tests: for code, the tests as texts.
        tools: beside messages, what the assistant may call.
    """

    id: RowId
    prompt: str | tuple[Message, ...]
    answer: str
    gold: Any
    system: str | None = None
    tests: tuple[str, ...] = field(default=())
    tools: tuple[Any, ...] | None = None


def read_questions(recipe: EvaluationRecipe) -> list[Question]:
    """The rows of a task, the first `limit` of them.

    Raises:
        DataError: the source cannot be read, has other columns, or holds no row.
    """
    source = SOURCES[recipe.task]
    path = recipe.path or source.path
    name = recipe.name if recipe.path or recipe.name else source.name
    if path is None:
        raise InputError(f"the task {recipe.task} has no data of its own: give evaluation.path.")
    questions = read_rows(recipe, path, name, recipe.split)
    if not questions:
        raise DataError(
            f"evaluation of {recipe.task}: {path} holds no row of the split {recipe.split!r}. "
            "Expected at least one; check evaluation.path and evaluation.split."
        )
    return questions[: recipe.limit]


def read_rows(
    recipe: EvaluationRecipe,
    path: str | Sequence[str],
    name: str | Sequence[str] | None,
    split: str,
) -> list[Question]:
    """All rows of one source, in their order.

    Args:
        recipe: the task and its columns.
        path: local file or hub id, or several.
        name: configuration on the hub, or several.
        split: its split; for a local MBPP file, which holds all, the rows with its ids.

    Raises:
        DataError: the source cannot be read or has other columns.
    """
    if recipe.task == "mbpp":
        return _read_code(recipe, path, name, split)
    found = read_examples(
        path,
        name=name,
        split=split,
        columns=_columns(recipe),
    )
    questions = []
    for number, (row, example) in enumerate(found):
        if isinstance(example, Pair) and (example.history or example.tools):
            example = example.as_chat()
        if isinstance(example, Pair):
            gold = example.completion
            questions.append(
                Question(_id(row.values, number), example.prompt, gold, gold, example.system)
            )
        elif isinstance(example, Chat):
            questions.append(_chat_question(example, _id(row.values, number)))
        # A row with an empty field is no example.
        _check_gold(recipe.task, "" if example is None else questions[-1].gold, row.where)
    return _with_unique_ids(questions)


def _check_gold(task: str, gold: Any, where: str) -> None:
    """Refuse a right answer in which the task's scorers find none: every answer would be wrong."""
    if task == "gsm8k" and isinstance(gold, str) and gsm8k_gold(gold) is None:
        raise DataError(
            f"{where}: the right answer {gold[-60:]!r} holds no number, so that every answer would "
            "count as wrong. Expected one behind '####', or as the last number of the text"
        )


def _read_code(
    recipe: EvaluationRecipe,
    path: str | Sequence[str],
    name: str | Sequence[str] | None,
    split: str,
) -> list[Question]:
    questions = []
    columns = _columns(recipe)
    for row in load_rows(path, name=name, split=split).rows:
        # The sanitized rows call their text "prompt".
        text = row.values.get(columns.get("prompt", "text"), row.values.get("prompt"))
        tests = row.values.get("test_list")
        if not isinstance(text, str) or not isinstance(tests, list):
            raise DataError(
                f"{row.where} is no row of MBPP: got the columns {', '.join(row.values)}. Expected "
                "text (or prompt), code, test_list and, where needed, test_setup_code."
            )
        identifier = row.values.get("task_id", row.number)
        if Path(row.source).suffix and not _is_in_split(identifier, split):
            continue
        gold = {
            "test_list": tests,
            "test_setup_code": row.values.get("test_setup_code") or "",
            "test_imports": row.values.get("test_imports") or [],
        }
        code = str(row.values.get(columns["completion"]) or "")
        questions.append(Question(identifier, text, code, gold, tests=tuple(map(str, tests))))
    return questions


def _columns(recipe: EvaluationRecipe) -> dict[str, str]:
    given = {role: str(column) for role, column in recipe.columns.items()}
    return {**SOURCES[recipe.task].columns, **given}


def _is_in_split(identifier: RowId, split: str) -> bool:
    if split not in _MBPP_SPLITS or not isinstance(identifier, int):
        return True
    first, last = _MBPP_SPLITS[split]
    return first <= identifier <= last


def _chat_question(chat: Chat, identifier: RowId) -> Question:
    """The last answer of a conversation is asked for, all before it is given."""
    last = max(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
    answer = str(chat.messages[last]["content"])
    return Question(identifier, tuple(chat.messages[:last]), answer, answer, tools=chat.tools)


def _id(values: Mapping[str, Any], number: int) -> RowId:
    identifier = values.get("id")
    is_usable = isinstance(identifier, int | str) and not isinstance(identifier, bool)
    return identifier if is_usable and identifier is not None else number


def _with_unique_ids(questions: list[Question]) -> list[Question]:
    """The questions, numbered afresh where two share an id, as rows of several files may."""
    if len({question.id for question in questions}) == len(questions):
        return questions
    return [replace(question, id=number) for number, question in enumerate(questions)]
