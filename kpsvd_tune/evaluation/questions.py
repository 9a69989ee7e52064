"""The rows of a task as questions, and the questions as prompts for the model.

By default a prompt is exactly what a model trained with our recipes saw before its answer, with
worked examples before it where the recipe asks for some. "lm-eval" and "bigcode" are the prompts
of those two harnesses, for comparison with published figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data import Encoder, read_examples
from kpsvd_tune.data.encode.format import Chat, Pair
from kpsvd_tune.data.encode.templates import TextTemplate
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.data.read.sources import is_local_file, load_rows
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.completions import RowId
from kpsvd_tune.evaluation.generation import NO_LIMIT, Prompt
from kpsvd_tune.evaluation.json_answer import gold_of, read_schema
from kpsvd_tune.evaluation.label_answer import labels_of
from kpsvd_tune.evaluation.numeric_answer import flexible_answer, gsm8k_gold
from kpsvd_tune.evaluation.own_keys import advising_own_keys
from kpsvd_tune.evaluation.tasks import TASKS, asserts_nothing
from kpsvd_tune.recipe import EvaluationRecipe

Message = Mapping[str, Any]
# The first and last task_id of each split, for local files, which hold all splits together.
_MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
_LM_EVAL_CODE_SHOTS = (2, 3, 4)  # the task_id of MBPP rows
# Worked examples of a harness, where the recipe says nothing.
_HARNESS_SHOTS = {("lm-eval", "mbpp"): 3, ("lm-eval", "gsm8k"): 5}
_HARNESS_STOPS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("lm-eval", "gsm8k"): ("Question:",),
    ("lm-eval", "mbpp"): ("[DONE]",),
    ("bigcode", "mbpp"): ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"),
}


@dataclass(frozen=True)
class Question:
    """One row of a task."""

    id: RowId  # in the source, or its number from 0
    prompt: str | tuple[Message, ...]  # a text, or chat messages up to a user's
    answer: str  # as a model would write it, for worked examples
    gold: Any  # what scorers compare with
    system: str | None = None
    tests: tuple[str, ...] = ()  # of a program
    tools: tuple[Any, ...] | None = None  # beside messages, what the assistant may call

    @property
    def text(self) -> str:
        """The prompt, where it is one text and no messages."""
        assert isinstance(self.prompt, str)
        return self.prompt

    @property
    def asked(self) -> str:
        """The question as the template takes it, with the tests that tell the program's name.

        They stand as in training, where the text is the instruction and the tests are the input.
        """
        return "\n\n".join([self.text, "\n".join(self.tests)]) if self.tests else self.text


def read_questions(recipe: EvaluationRecipe) -> list[Question]:
    """The rows of a task, the first `limit` of them.

    Raises:
        DataError: the source cannot be read, has other columns, or holds no row.
    """
    with advising_own_keys(recipe):
        return _read_questions(recipe)


def _read_questions(recipe: EvaluationRecipe) -> list[Question]:
    source = TASKS[recipe.task]
    path = recipe.path or source.path
    name = recipe.name if recipe.path or recipe.name else source.name
    if path is None:
        raise InputError(f"the task {recipe.task} has no data of its own: give evaluation.path.")
    questions = _read_rows(recipe, path, name, recipe.split)
    if not questions:
        raise DataError(
            f"evaluation of {recipe.task}: {path} holds no row of the split {recipe.split!r}. "
            "Expected at least one; check evaluation.path and evaluation.split."
        )
    if recipe.task == "label":
        labels = labels_of([each.answer for each in questions], recipe.labels, str(path))
        questions = [
            replace(each, gold={"label": each.answer.strip(), "labels": list(labels)})
            for each in questions
        ]
    elif recipe.task == "json":
        schema = None if recipe.json_schema is None else read_schema(recipe.json_schema)
        questions = [
            replace(each, gold=gold_of(each.answer, schema, f"{path}, the row {each.id}"))
            for each in questions
        ]
    return questions[: recipe.limit]


def _read_rows(
    recipe: EvaluationRecipe,
    path: str | Sequence[str],
    name: str | Sequence[str] | None,
    split: str,
) -> list[Question]:
    """All rows of one source, in their order; numbered where two share an id, as of two files."""
    given = {role: str(column) for role, column in recipe.columns.items()}
    columns = {**TASKS[recipe.task].columns, **given}
    if recipe.task == "mbpp":
        return _read_code(load_rows(path, name=name, split=split).rows, columns, split)
    questions = []
    found = read_examples(
        path,
        name=name,
        split=split,
        columns=columns,
        ignore_columns=recipe.ignore_columns or (),
        setting=recipe.written("columns"),
    )
    for number, (row, example) in enumerate(found):
        # A row with an empty field is no example.
        with row.told_in_errors():
            question = None if example is None else _question(example, _id(row.values, number))
        gold = question.gold if question else ""
        _check_gold(recipe.task, gold, row.where, is_own=recipe.path is not None)
        if question:
            questions.append(question)
    # As texts: one file may number its rows by numbers and another one by texts.
    if len({str(question.id) for question in questions}) == len(questions):
        return questions
    return [replace(question, id=number) for number, question in enumerate(questions)]


def _question(example: Pair | Chat, identifier: RowId) -> Question:
    """Of a conversation the last answer that would be learnt is asked for, all before it is given.

    DataError: that answer calls a tool, and scorers compare texts; or the row is plain text.
    """
    if isinstance(example, Pair) and not (example.history or example.tools):
        answer = example.completion
        if example.is_plain:
            raise DataError(
                "the row is plain text, which asks nothing, so there is no right answer to compare "
                "with. Expected a prompt and a completion, or a chat: name their columns "
                "(dataset.columns), or measure such rows with the task loss"
            )
        return Question(identifier, example.prompt, answer, answer, example.system)
    chat = example.as_chat() if isinstance(example, Pair) else example
    last = chat.learnt[-1]
    if chat.last_called is not None:
        raise DataError(
            f"the last answer calls the tool {chat.last_called!r}, and the scorers compare texts "
            "alone, so every answer would count as wrong. Expected a last answer in words: take "
            "such rows out, or measure them with the task loss"
        )
    answer = str(chat.messages[last]["content"])
    return Question(identifier, tuple(chat.messages[:last]), answer, answer, tools=chat.tools)


def _id(values: Mapping[str, Any], number: int) -> RowId:
    identifier = values.get("id")
    is_usable = isinstance(identifier, int | str) and not isinstance(identifier, bool)
    return identifier if is_usable and identifier is not None else number


def _check_gold(task: str, gold: Any, where: str, *, is_own: bool) -> None:
    """Refuse a right answer in which the task's scorers find none: every answer would be wrong.

    Of rows of one's own (`is_own`) what stands behind the mark must be a number alone, as in
    published rows: with a unit or as a fraction it would equal none of the numbers in answers.
    """
    if task != "gsm8k" or not isinstance(gold, str):
        return
    number = gsm8k_gold(gold)
    if number is None:
        raise DataError(
            f"{where}: the right answer {gold[-60:]!r} holds no number, so that every answer would "
            "count as wrong. Expected one behind '####', or as the last number of the text"
        )
    if is_own and flexible_answer(number) != number:
        raise DataError(
            f"{where}: the right answer ends in '#### {number[:40]}', which is no number alone, so "
            "that every answer would count as wrong. Expected a number without a unit behind "
            "'####', or another task, such as exact_match"
        )


def _read_code(rows: Iterable[Row], columns: Mapping[str, str], split: str) -> list[Question]:
    """Rows of MBPP; of a local file, which holds all splits, those whose ids are the split's."""
    questions = []
    for row in rows:
        # The sanitized rows call their text "prompt".
        text = row.values.get(columns.get("prompt", "text"), row.values.get("prompt"))
        tests = row.values.get("test_list")
        if not isinstance(text, str) or not isinstance(tests, list):
            raise DataError(
                f"{row.where} is no row of MBPP: got the columns {', '.join(row.values)}. Expected "
                "text (or prompt), code, test_list and, where needed, test_setup_code."
            )
        idle = [str(test) for test in tests if asserts_nothing(str(test))]
        if idle:
            raise DataError(
                f"{row.where}: the test {idle[0][:60]!r} asserts nothing, so that every program "
                "would pass it. Expected assert before what has to be true"
            )
        identifier = row.values.get("task_id", row.number)
        first, last = _MBPP_SPLITS.get(split, (-math.inf, math.inf))
        is_numbered = bool(Path(row.source).suffix) and isinstance(identifier, int)
        if is_numbered and not first <= identifier <= last:
            continue
        gold = {
            "test_list": tests,
            "test_setup_code": row.values.get("test_setup_code") or "",
            "test_imports": row.values.get("test_imports") or [],
        }
        code = str(row.values.get(columns["completion"]) or "")
        questions.append(Question(identifier, text, code, gold, tests=tuple(map(str, tests))))
    return questions


def num_shots(recipe: EvaluationRecipe) -> int:
    """Worked examples before each question: the recipe's number, else as the prompt has it."""
    if recipe.shots is not None:
        return recipe.shots
    return _HARNESS_SHOTS.get((recipe.prompt, recipe.task), 0)


def read_shots(recipe: EvaluationRecipe, questions: Sequence[Question]) -> list[Question]:
    """The worked examples to put before each of the questions, never rows that are scored.

    Raises:
        InputError: there are no other rows to take them from, or one of them is a question.
        DataError: there are too few, or they cannot be read.
    """
    wanted = num_shots(recipe)
    if wanted == 0:
        return []
    source = TASKS[recipe.task]
    path = recipe.shots_path or recipe.path or source.path
    is_file = isinstance(path, str) and is_local_file(path)
    if path is None or (recipe.task != "mbpp" and is_file and path == recipe.path):
        raise InputError(
            f"worked examples for {recipe.task} must be other rows than those that are scored. "
            f"Give a file of examples ({recipe.written('shots_path')}), or "
            f"{recipe.written('shots')} 0."
        )
    name = recipe.name if path == recipe.path or recipe.name else source.name
    with advising_own_keys(recipe):
        shots = _read_rows(recipe, path, name, source.shots_split)
    if recipe.prompt == "lm-eval" and recipe.task == "mbpp":
        shots = [shot for shot in shots if shot.id in _LM_EVAL_CODE_SHOTS]
    if len(shots) < wanted:
        raise DataError(
            f"{path} holds {len(shots)} worked examples, but {wanted} are wanted: set "
            f"{recipe.written('shots')} to {len(shots)} or less, or "
            f"{recipe.written('shots_path')} to a source with more."
        )
    shots = shots[:wanted]
    # By what they say, for one file has many paths, and a folder may hold it too.
    scored = {_said(question): question.id for question in questions}
    if shown := next((shot for shot in shots if _said(shot) in scored), None):
        raise InputError(
            f"the worked example {shown.id!r} of {path} is the row {scored[_said(shown)]!r} of "
            "those that are scored, so its right answer would stand in the prompt. Expected other "
            f"rows: give a file of examples ({recipe.written('shots_path')}), or "
            f"{recipe.written('shots')} 0."
        )
    return shots


def _said(question: Question) -> str:
    """What a question and its right answer say, as a key."""
    return json.dumps([question.prompt, question.answer], sort_keys=True, default=str)


def build_prompts(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    recipe: EvaluationRecipe,
    shots: Sequence[Question] = (),
) -> tuple[list[Prompt], tuple[int, ...]]:
    """What the model is given for each question, and the tokens that end an answer.

    `template`, a text or "chat", must work with the tokenizer: else DataError.
    """
    with advising_own_keys(recipe):
        return _build_prompts(questions, tokenizer, template, recipe, shots)


def _build_prompts(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    recipe: EvaluationRecipe,
    shots: Sequence[Question],
) -> tuple[list[Prompt], tuple[int, ...]]:
    is_chat = any(not isinstance(question.prompt, str) for question in questions)
    is_chat |= template == "chat" and recipe.prompt == "template"
    used = "chat" if is_chat else "{prompt}{completion}"
    encoder = Encoder(tokenizer, used, NO_LIMIT, learn=recipe.learn or "all")
    before = ""
    if not is_chat:
        rendered = [_render(shot, template, recipe) for shot in shots]
        before = "".join(text + answer + "\n\n" for text, answer in rendered)
    prompts = []
    for question in questions:
        if is_chat:
            ids = encoder.encode_prompt(_messages(question, shots), tools=question.tools)
            text = encoder.decode(ids)
        else:
            text = before + _render(question, template, recipe)[0]
            ids = encoder.encode_prompt(text)
        prompts.append(Prompt(question.id, text, tuple(ids), question.gold))
    return prompts, encoder.end_token_ids


def stop_strings(
    recipe: EvaluationRecipe, template: str, questions: Sequence[Question] = ()
) -> tuple[str, ...]:
    """Texts that end an answer besides the end token; by default the start of the template.

    A model that was never taught to stop goes on with a next question of its own. Where a right
    answer of `questions` holds that start, it ends none.
    """
    if recipe.stop is not None:
        return tuple(recipe.stop)
    if recipe.prompt != "template":
        return _HARNESS_STOPS[recipe.prompt, recipe.task]
    head = "" if template == "chat" else template.split("{")[0].strip()
    is_held = any("\n" + head in question.answer for question in questions)
    return ("\n" + head,) if head and not is_held else ()


def answer_tail(recipe: EvaluationRecipe, template: str) -> str:
    """What the template writes behind an answer, which is learnt with it; "" where nothing is."""
    is_text = template != "chat" and recipe.prompt == "template"
    return template.rpartition("{completion}")[2].strip() if is_text else ""


def _render(question: Question, template: str, recipe: EvaluationRecipe) -> tuple[str, str]:
    """Prompt text and answer text of one row."""
    if recipe.prompt == "bigcode":
        return f'"""\n{question.text}\n{question.tests[0]}\n"""\n', question.answer
    if recipe.prompt == "lm-eval" and recipe.task == "mbpp":
        # The sentence of the MBPP paper (Austin et al. 2021, section 3), which fixes the protocol.
        tests = "\n".join(question.tests[:3])
        return (
            "You are an expert Python programmer, and here is your task: "
            f"{question.text} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n",
            question.answer + "\n[DONE]",
        )
    if recipe.prompt == "lm-eval":
        template = TASKS[recipe.task].template
    return TextTemplate(template).render(Pair(question.asked, question.answer, question.system))


def _messages(question: Question, shots: Sequence[Question]) -> Sequence[Message]:
    """The question as messages, worked examples being earlier rounds of the chat.

    The system prompt is the question's own.
    """
    system, asked = _as_messages(question)
    rounds: list[Message] = []
    for shot in shots:
        rounds += [*_as_messages(shot)[1], {"role": "assistant", "content": shot.answer}]
    return [*system, *rounds, *asked]


def _as_messages(question: Question) -> tuple[list[Message], list[Message]]:
    """The system prompt as messages, and those from there up to the answer."""
    if isinstance(question.prompt, str):
        messages = Pair(question.asked, "", question.system).as_chat().messages[:-1]
    else:
        messages = question.prompt
    asked = list(dropwhile(lambda each: each["role"] in ("system", "developer"), messages))
    return list(messages[: len(messages) - len(asked)]), asked
