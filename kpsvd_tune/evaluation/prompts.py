"""How a question is put to the model: the training template, or the prompt of another harness.

By default a prompt is exactly what a model trained with our recipes saw before its answer, with
worked examples before it where asked for. "lm-eval" and "bigcode" are the prompts of those two
harnesses, for comparison with published figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data import Encoder
from kpsvd_tune.data.encode.format import Pair
from kpsvd_tune.data.encode.templates import TextTemplate
from kpsvd_tune.data.read.sources import is_local_file
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.generate import Prompt
from kpsvd_tune.evaluation.tasks import SOURCES, Message, Question, read_rows
from kpsvd_tune.recipe import EvaluationRecipe

_NO_LIMIT = 2**31  # a prompt is never cut: one that does not fit is refused by name
_LM_EVAL_CODE_SHOTS = (2, 3, 4)  # the task_id of MBPP rows
# Worked examples of a harness, where the recipe says nothing.
_HARNESS_SHOTS = {("lm-eval", "mbpp"): 3, ("lm-eval", "gsm8k"): 5}
_HARNESS_STOPS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("lm-eval", "gsm8k"): ("Question:",),
    ("lm-eval", "mbpp"): ("[DONE]",),
    ("bigcode", "mbpp"): ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"),
}


def num_shots(recipe: EvaluationRecipe) -> int:
    """Worked examples before each question: the recipe's number, else as the prompt has it."""
    if recipe.shots is not None:
        return recipe.shots
    return _HARNESS_SHOTS.get((recipe.prompt, recipe.task), 0)


def read_shots(recipe: EvaluationRecipe) -> list[Question]:
    """The worked examples to put before each question, never rows that are scored.

    Raises:
        InputError: there are no other rows to take them from; the message says what to give.
        DataError: the source holds too few.
    """
    wanted = num_shots(recipe)
    if wanted == 0:
        return []
    source = SOURCES[recipe.task]
    path = recipe.shots_path or recipe.path or source.path
    is_file = isinstance(path, str) and is_local_file(path)
    if path is None or (recipe.task != "mbpp" and is_file and path == recipe.path):
        raise InputError(
            f"worked examples for {recipe.task} must be other rows than those that are scored. "
            "Give a file of examples (shots_path), or shots=0."
        )
    name = recipe.name if path == recipe.path or recipe.name else source.name
    shots = read_rows(recipe, path, name, source.shots_split)
    if recipe.prompt == "lm-eval" and recipe.task == "mbpp":
        shots = [shot for shot in shots if shot.id in _LM_EVAL_CODE_SHOTS]
    if len(shots) < wanted:
        raise DataError(
            f"{path} holds {len(shots)} worked examples, but {wanted} are wanted: set shots to "
            f"{len(shots)} or less, or shots_path to a source with more."
        )
    return shots[:wanted]


def build_prompts(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    recipe: EvaluationRecipe,
    shots: Sequence[Question] = (),
) -> tuple[list[Prompt], tuple[int, ...]]:
    """What the model is given for each question.

    Args:
        questions: the rows.
        tokenizer: the model's tokenizer.
        template: text with {prompt} and {completion}, or "chat".
        recipe: the task and whose prompt to use.
        shots: worked examples.

    Returns:
        The prompts, and the tokens that end an answer.

    Raises:
        DataError: the template does not work with the tokenizer.
    """
    is_chat = any(not isinstance(question.prompt, str) for question in questions)
    if is_chat or (template == "chat" and recipe.prompt == "template"):
        chat = Encoder(tokenizer, "chat", _NO_LIMIT)
        prompts = []
        for question in questions:
            ids = chat.encode_prompt(_messages(question, recipe.task, shots), tools=question.tools)
            prompts.append(Prompt(question.id, chat.decode(ids), tuple(ids), question.gold))
        return prompts, chat.end_token_ids
    plain = Encoder(tokenizer, "{prompt}{completion}", _NO_LIMIT)
    before = "".join(
        text + answer + "\n\n" for text, answer in (_render(s, template, recipe) for s in shots)
    )
    prompts = []
    for question in questions:
        text = before + _render(question, template, recipe)[0]
        ids = plain.encode_prompt(text)
        prompts.append(Prompt(question.id, text, tuple(ids), question.gold))
    return prompts, plain.end_token_ids


def stop_strings(recipe: EvaluationRecipe, template: str) -> tuple[str, ...]:
    """Texts that end an answer besides the end token.

    By default the start of the training template: a model that was never taught to stop goes on
    with a next question of its own, which is no part of its answer.
    """
    if recipe.stop is not None:
        return tuple(recipe.stop)
    if recipe.prompt != "template":
        return _HARNESS_STOPS[recipe.prompt, recipe.task]
    head = "" if template == "chat" else template.split("{")[0].strip()
    return ("\n" + head,) if head else ()


def _asked(question: Question, task: str) -> str:
    """The question as the template takes it.

    Without its tests a program's name is unknown. They stand as in training, where the recipe
    reads the text as an instruction and the tests as its input.
    """
    assert isinstance(question.prompt, str)
    if task != "mbpp" or not question.tests:
        return question.prompt
    return question.prompt + "\n\n" + "\n".join(question.tests)


def _render(question: Question, template: str, recipe: EvaluationRecipe) -> tuple[str, str]:
    """Prompt text and answer text of one row."""
    assert isinstance(question.prompt, str)
    if recipe.prompt == "bigcode":
        return f'"""\n{question.prompt}\n{question.tests[0]}\n"""\n', question.answer
    if recipe.prompt == "lm-eval" and recipe.task == "mbpp":
        # The sentence of the MBPP paper (Austin et al. 2021, section 3), which fixes the protocol.
        tests = "\n".join(question.tests[:3])
        return (
            "You are an expert Python programmer, and here is your task: "
            f"{question.prompt} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n",
            question.answer + "\n[DONE]",
        )
    if recipe.prompt == "lm-eval":
        template = SOURCES[recipe.task].template
    pair = Pair(_asked(question, recipe.task), question.answer, question.system)
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
