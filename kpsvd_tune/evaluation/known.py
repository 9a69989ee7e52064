"""Rows that are scored although the model is trained on them: a score of what it memorised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kpsvd_tune.data import PreparedData
from kpsvd_tune.data.encode.encoder import TokenizedRow
from kpsvd_tune.data.encode.format import Chat, Pair
from kpsvd_tune.data.rows.store import are_among
from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.evaluate import as_trained
from kpsvd_tune.evaluation.loss import loss_examples
from kpsvd_tune.evaluation.questions import Question, read_questions
from kpsvd_tune.evaluation.tasks import TASKS
from kpsvd_tune.recipe import DatasetRecipe, EvaluationRecipe


def known_rows(
    tasks: Sequence[EvaluationRecipe], dataset: DatasetRecipe, data: PreparedData
) -> list[str]:
    """A sentence for each task some of whose rows are trained on, by their tokens.

    A row that training writes otherwise, as by another source's template, is not found.

    Raises:
        DataError: A task's rows cannot be read.
    """
    told = []
    for task in tasks:
        recipe = as_trained(task, dataset)
        examples = list(_examples(recipe))
        known = _num_known(examples, data)
        if known:
            told.append(
                f"KNOWN ROWS: {known} of the {len(examples)} rows that evaluation of {task.task} "
                "scores are trained on, so the score is partly one of known rows: take them out of "
                "one of the two"
            )
    return told


def _examples(recipe: EvaluationRecipe) -> Iterator[Pair | Chat]:
    """The rows of a task as training reads rows; none of running texts and of the harness."""
    if TASKS[recipe.task].scorers:
        yield from map(_example, read_questions(recipe))
    elif recipe.task == "loss":
        yield from loss_examples(recipe)


def _example(question: Question) -> Pair | Chat:
    if isinstance(question.prompt, str):
        return Pair(question.asked, question.answer, question.system)
    answer = {"role": "assistant", "content": question.answer}
    return Chat((*question.prompt, answer), question.tools)


def _num_known(examples: Sequence[Pair | Chat], data: PreparedData) -> int:
    """How many examples have a row that is trained on; all rows are looked up at once."""
    rows = [(place, row) for place, each in enumerate(examples) for row in _rows(each, data)]
    among = are_among([row for _, row in rows], data.train)
    return len({place for (place, _), is_known in zip(rows, among, strict=True) if is_known})


def _rows(example: Pair | Chat, data: PreparedData) -> list[TokenizedRow]:
    try:
        encoded = [data.encoder.encode(part, 0) for part in data.encoder.parts(example)]
    except DataError:  # training could not write it, so it has not
        return []
    return [row for row in encoded if len(row)]
