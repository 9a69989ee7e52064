"""How a question is put to the model: the training template, or the prompt of another harness.

By default a prompt is exactly what a model trained with our recipes saw before its answer, with
worked examples before it where asked for. "lm-eval" and "bigcode" are the prompts of those two
harnesses, for comparison with published figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data import Encoder
from kpsvd_tune.data.format import Pair
from kpsvd_tune.data.rows import is_local_file
from kpsvd_tune.data.template import TextTemplate
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.generate import Prompt
from kpsvd_tune.evaluation.tasks import SOURCES, Message, Question, read_rows
from kpsvd_tune.recipe import EvaluationRecipe

PromptStyle = Literal["template", "lm-eval", "bigcode"]

_NO_LIMIT = 2**31  # a prompt is never cut: one that does not fit is refused by name
_LM_EVAL_CODE_SHOTS = (2, 3, 4)  # the task_id of MBPP rows
_STYLE_STOPS: Mapping[tuple[PromptStyle, str], tuple[str, ...]] = {
    ("lm-eval", "gsm8k"): ("Question:",),
    ("lm-eval", "mbpp"): ("[DONE]",),
    ("bigcode", "mbpp"): ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"),
}


@dataclass(frozen=True)
class Prompting:
    """How a question is put to the model.

    Attributes:
        style: "template": the training template (text or chat); "lm-eval" for gsm8k and mbpp and
            "bigcode" for mbpp: the prompts of those harnesses.
        num_shots: worked examples before each question; None: as the style has it (3 for mbpp in
            lm-eval, none elsewhere).
        shots_path: file or hub id of the examples; None: the task's own training rows.
        stop: texts that end an answer; None: those of the style, or the start of the template.
    """

    style: PromptStyle = "template"
    num_shots: int | None = None
    shots_path: str | None = None
    stop: tuple[str, ...] | None = None


def read_shots(
    recipe: EvaluationRecipe, prompting: Prompting, *, offline: bool = False
) -> list[Question]:
    """The worked examples to put before each question, never rows that are scored.

    Raises:
        InputError: there are no other rows to take them from; the message says what to give.
        DataError: the source holds too few.
    """
    is_lm_eval_code = prompting.style == "lm-eval" and recipe.task == "mbpp"
    wanted = prompting.num_shots if prompting.num_shots is not None else 3 * is_lm_eval_code
    if wanted == 0:
        return []
    source = SOURCES[recipe.task]
    path = prompting.shots_path or recipe.path or source.path
    is_file = isinstance(path, str) and is_local_file(path)
    if path is None or (recipe.task != "mbpp" and is_file and path == recipe.path):
        raise InputError(
            f"worked examples for {recipe.task} must be other rows than those that are scored. "
            "Give a file of examples, or num_shots 0."
        )
    name = recipe.name if path == recipe.path else source.name
    shots = read_rows(recipe, path, name, source.shots_split, offline)
    if is_lm_eval_code:
        shots = [shot for shot in shots if shot.id in _LM_EVAL_CODE_SHOTS]
    if len(shots) < wanted:
        raise DataError(f"{path} holds {len(shots)} worked examples, but num_shots is {wanted}.")
    return shots[:wanted]


def build_prompts(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    task: str,
    prompting: Prompting,
    shots: Sequence[Question] = (),
) -> tuple[list[Prompt], tuple[int, ...]]:
    """What the model is given for each question.

    Args:
        questions: the rows.
        tokenizer: the model's tokenizer.
        template: text with {prompt} and {completion}, or "chat".
        task: name of the task.
        prompting: style of the prompt.
        shots: worked examples.

    Returns:
        The prompts, and the tokens that end an answer.

    Raises:
        InputError: the style does not exist for the task.
        DataError: the template does not work with the tokenizer.
    """
    if prompting.style != "template" and (prompting.style, task) not in _STYLE_STOPS:
        raise InputError(
            f"there is no {prompting.style} prompt for the task {task}. Expected template, or "
            + ", ".join(f"{style} for {name}" for style, name in _STYLE_STOPS)
            + "."
        )
    is_chat = any(not isinstance(question.prompt, str) for question in questions)
    if is_chat or (template == "chat" and prompting.style == "template"):
        chat = Encoder(tokenizer, "chat", _NO_LIMIT)
        prompts = []
        for question in questions:
            ids = chat.encode_prompt(_messages(question, task, shots))
            prompts.append(Prompt(question.id, chat.decode(ids), tuple(ids), question.gold))
        return prompts, chat.end_token_ids
    plain = Encoder(tokenizer, "{prompt}{completion}", _NO_LIMIT)
    before = "".join(
        text + answer + "\n\n"
        for text, answer in (_render(s, template, task, prompting) for s in shots)
    )
    prompts = []
    for question in questions:
        text = before + _render(question, template, task, prompting)[0]
        ids = plain.encode_prompt(text)
        prompts.append(Prompt(question.id, text, tuple(ids), question.gold))
    return prompts, plain.end_token_ids


def stop_strings(prompting: Prompting, template: str, task: str) -> tuple[str, ...]:
    """Texts that end an answer besides the end token.

    By default the start of the training template: a model that was never taught to stop goes on
    with a next question of its own, which is no part of its answer.
    """
    if prompting.stop is not None:
        return prompting.stop
    if prompting.style != "template":
        return _STYLE_STOPS[prompting.style, task]
    head = "" if template == "chat" else template.split("{")[0].strip()
    return ("\n" + head,) if head else ()


def _asked(question: Question, task: str) -> str:
    """The question as the template takes it; without its tests a program's name is unknown."""
    assert isinstance(question.prompt, str)
    return "\n".join([question.prompt, *question.tests]) if task == "mbpp" else question.prompt


def _render(question: Question, template: str, task: str, prompting: Prompting) -> tuple[str, str]:
    """Prompt text and answer text of one row."""
    assert isinstance(question.prompt, str)
    if prompting.style == "bigcode":
        return f'"""\n{question.prompt}\n{question.tests[0]}\n"""\n', question.answer
    if prompting.style == "lm-eval" and task == "mbpp":
        # The sentence of the MBPP paper (Austin et al. 2021, section 3), which fixes the protocol.
        tests = "\n".join(question.tests[:3])
        return (
            "You are an expert Python programmer, and here is your task: "
            f"{question.prompt} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n",
            question.answer + "\n[DONE]",
        )
    if prompting.style == "lm-eval":
        template = SOURCES[task].template
    pair = Pair(_asked(question, task), question.answer, question.system)
    return TextTemplate(template).render(pair)


def _messages(question: Question, task: str, shots: Sequence[Question]) -> list[Message]:
    if not isinstance(question.prompt, str):
        return list(question.prompt)
    messages: list[Message] = []
    if question.system:
        messages.append({"role": "system", "content": question.system})
    for shot in shots:
        messages.append({"role": "user", "content": _asked(shot, task)})
        messages.append({"role": "assistant", "content": shot.answer})
    messages.append({"role": "user", "content": _asked(question, task)})
    return messages
