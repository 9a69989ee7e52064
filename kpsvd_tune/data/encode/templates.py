"""Which template a run uses: the tokenizer's, a shipped one, a file, or plain text.

The shipped chat templates are written for training: each marks what the assistant writes.
Arguments are written into the template's own text as defaults, so that training, evaluation and
every program that loads the saved tokenizer later render alike without knowing them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import jinja2
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode.chat_program import TemplateError, variables_of
from kpsvd_tune.data.encode.format import Pair
from kpsvd_tune.data.read.columns import naming
from kpsvd_tune.errors import DataError, did_you_mean
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.recipe.dataset import CHAT_TEMPLATES, chat_template_problem
from kpsvd_tune.storage.paths import expand

Template = str | dict[str, str]


@dataclass(frozen=True)
class Family:
    """Models whose chats a shipped template writes."""

    marks: tuple[str, ...]  # texts that the own templates of these models all hold
    tokens: tuple[str, ...] = ()  # special tokens that it writes: the tokenizer must know them
    # Arguments with which it is tried, in turn, against a model's own template.
    variants: tuple[Mapping[str, Any], ...] = ({},)


# A template's family is the first whose marks all occur, so the more special ones come first.
FAMILIES: Mapping[str, Family] = {
    "deepseek-r1": Family(
        ("<｜User｜>", "<｜Assistant｜><think>"),
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    ),
    "deepseek": Family(
        ("<｜User｜>", "<｜Assistant｜>"),
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    ),
    "llama3": Family(
        ("<|start_header_id|>", "<|eot_id|>"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llama2": Family(("<<SYS>>", "[INST]")),
    "mistral": Family(("[INST]",)),
    "gemma": Family(("<start_of_turn>", "<end_of_turn>"), ("<start_of_turn>", "<end_of_turn>")),
    "phi4": Family(("<|im_sep|>", "<|im_start|>"), ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    "qwen3": Family(("<|im_start|>", "<think>", "enable_thinking"), ("<|im_start|>", "<|im_end|>")),
    "chatml": Family(
        ("<|im_start|>", "<|im_end|>"),
        ("<|im_start|>", "<|im_end|>"),
        ({}, {"write_bos": True}),
    ),
    "phi3": Family(
        ("<|user|>\n", "<|end|>"), ("<|end|>", "<|assistant|>"), ({}, {"write_bos": True})
    ),
    "phi4-mini": Family(("<|end|>", "'<|' + message"), ("<|end|>", "<|assistant|>")),
    "zephyr": Family(("<|user|>\n", "eos_token")),
    "command-r": Family(
        ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    ),
}
# Names that every rendering gives, which are therefore no arguments.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}


@cache
def shipped_template(name: str) -> str:
    """The text of a shipped template."""
    folder = files("kpsvd_tune.data.encode").joinpath("shipped")
    return folder.joinpath(f"{name}.jinja").read_text(encoding="utf-8")


def shipped_name(template: str) -> str | None:
    """Which shipped template a text is, with or without arguments; None for any other."""
    return next((name for name in FAMILIES if template.endswith(shipped_template(name))), None)


def texts_of(template: Template) -> list[str]:
    """The one text of a template, or those of all that a tokenizer chooses among."""
    return [template] if isinstance(template, str) else list(template.values())


def family_of(template: Template | None) -> str | None:
    """The family that a tokenizer's own template belongs to; None where it is of none."""
    text = "".join(texts_of(template or ""))
    return next(
        (name for name, each in FAMILIES.items() if all(mark in text for mark in each.marks)), None
    )


def use_recipe_template(tokenizer: PreTrainedTokenizerBase, dataset: DatasetRecipe) -> None:
    """Give a tokenizer the chat template and arguments of the recipe, where it names any.

    Raises DataError for an unknown template, missing tokens, or an argument that it does not read.
    """
    template: Template | None = tokenizer.chat_template
    if dataset.chat_template is not None:
        template = _named_template(dataset.chat_template, tokenizer)
    if dataset.template_arguments:
        if not template:
            raise DataError(
                "dataset.template_arguments are given and the tokenizer has no chat template to "
                "read them; name one with dataset.chat_template, or remove them"
            )
        _check_arguments(template, dataset.template_arguments, tokenizer)
        template = with_arguments(template, dataset.template_arguments)
    tokenizer.chat_template = template


def with_arguments(template: Template, arguments: Mapping[str, Any]) -> Template:
    """A template in whose text arguments stand as defaults: who renders it may give others."""
    if isinstance(template, dict):
        return {name: str(with_arguments(text, arguments)) for name, text in template.items()}
    lines = "".join(
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(value)} -%}}"
        "{%- endif -%}\n"
        for name, value in arguments.items()
    )
    return template if template.startswith(lines) else lines + template


def reads(template: Template, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The arguments that a template reads."""
    try:
        names: set[str] = set().union(*map(variables_of, texts_of(template)))
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template does not compile: {error}; correct it") from error
    return names - _GIVEN - set(tokenizer.special_tokens_map)


def missing_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that a shipped template writes and the tokenizer does not know."""
    known = tokenizer.get_vocab()
    return [token for token in FAMILIES[name].tokens if token not in known]


def _named_template(value: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if value in CHAT_TEMPLATES:
        if missing := missing_tokens(value, tokenizer):
            raise DataError(
                f"dataset.chat_template: {value} writes the special token {missing[0]!r}, which "
                "this tokenizer does not know, so its turns would not end with one token; "
                f"expected one of the model's own family ({', '.join(CHAT_TEMPLATES)}), or a file"
            )
        return shipped_template(value)
    path = expand(value)
    if problem := chat_template_problem(value):
        raise DataError(f"dataset.chat_template: {problem}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"dataset.chat_template: cannot read {path}: {error}") from error
    if "messages" not in text:
        raise DataError(
            f"dataset.chat_template: {path} reads no messages; expected a jinja template of chats, "
            "such as the chat_template.jinja beside a model"
        )
    return text


def _check_arguments(
    template: Template, arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    known = reads(template, tokenizer)
    if unknown := [name for name in arguments if name not in known]:
        listed = f"it reads {', '.join(sorted(known))}"
        raise DataError(
            f"dataset.template_arguments: the chat template does not read {unknown[0]!r}, so it "
            f"would change nothing; {listed if known else 'it reads no arguments: remove them'}"
            f"{did_you_mean(unknown[0], known)}"
        )


def _literal(value: Any) -> str:
    """A plain value as jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_literal(str(key))}: {_literal(each)}" for key, each in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    # The escapes of JSON are jinja's too; other characters stand for themselves.
    return json.dumps(value, ensure_ascii=False)


_ESCAPE = re.compile(r"\\[nt]([a-z]*)")
# What LaTeX has of such commands, without the first letter.
_COMMANDS = frozenset(
    "abla atural e earrow eg eq ewline exists geq i leq mid oindent olimits onumber ot otin u ag "
    "an anh au ext extbf extit extrm extsf exttt extstyle frac binom herefore heta ilde imes iny "
    "o op riangle".split()
)


def unread_escape(text: str, key: str) -> str | None:
    r"""What a user should know where a text holds \n or \t as two characters; None elsewhere.

    A shell, and single quotes or none in YAML, leave them so, and they are learnt as they stand.
    """
    found = next((each for each in _ESCAPE.finditer(text) if each[1] not in _COMMANDS), None)
    if found is None:
        return None
    name = "a line break" if found[0][1] == "n" else "a tab"
    return (
        f"{key} holds a backslash and {found[0][1]!r}, two characters, and not {name}: if "
        f"{name} is meant, put double quotes around the text in YAML, and on a command line "
        f"'{key}=\"...\"'"
    )


_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_DOUBLED = re.compile(r"\{\{\w+\}\}")  # as in jinja
_KNOWN = ("prompt", "completion", "system")


class TextTemplate:
    r"""A template such as "Question: {prompt}\nAnswer: {completion}".

    Only the three placeholders are replaced, each once and in one pass: braces in a template
    ("\boxed{}") or in a row stay as they are. Text behind {completion} is learnt with it.
    DataError: a placeholder is unknown, or all are in double braces, or {completion} is not there
    once, as the last of them.
    """

    def __init__(self, template: str) -> None:
        names = _PLACEHOLDER.findall(template)
        fault = None
        if unknown := [name for name in names if name not in _KNOWN]:
            fault = (
                f"has the placeholder {{{unknown[0]}}}; to use a column of that name write "
                f"{{prompt}} and {naming('dataset.columns', {'prompt': unknown[0]})}"
            )
        elif len(names) > 1 and len(_DOUBLED.findall(template)) == len(names):
            fault = (
                "writes its placeholders in double braces, of which one pair would stand around "
                "every text; here one pair is meant: {prompt}"
            )
        elif names.count("completion") != 1:
            fault = f"has {{completion}} {names.count('completion')} times; expected once"
        elif names[-1] != "completion":
            fault = f"has {{{names[-1]}}} behind {{completion}}; expected it before"
        if fault:
            raise DataError(
                f"dataset.template {fault}; expected text such as "
                r'"Question: {prompt}\nAnswer: {completion}", or chat'
            )
        self.has_prompt = "prompt" in names
        self.has_system = "system" in names
        self._head, _, self._tail = template.partition("{completion}")

    def render(self, pair: Pair) -> tuple[str, str]:
        """Prompt text and completion text; spaces at the end of the first move to the second."""
        values = {"prompt": pair.prompt, "system": pair.system or ""}
        text = _PLACEHOLDER.sub(lambda match: values[match[1]], self._head)
        prompt = text.rstrip(" ")
        return prompt, text[len(prompt) :] + pair.completion + self._tail


T = TypeVar("T")


def with_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    dataset: DatasetRecipe,
    work: Callable[[Template | None], T],
    *,
    keeps_template: bool = False,
) -> tuple[T, list[str]]:
    """Do `work` with the tokenizer's chat template, or with a shipped one where that fails.

    A shipped one marks the answers, or takes messages that the own one refuses. It is tried only
    where the recipe names none, and used only where it asks exactly as the tokenizer's own does in
    every row, so that inference sees the same. `work` is given None, or the own template to compare
    with. Gives what `work` returned, and notes; the tokenizer keeps the template used. The
    TemplateError, where neither can be trained, is that of the own one.
    """
    use_recipe_template(tokenizer, dataset)
    own: Template | None = tokenizer.chat_template
    try:
        return work(None), []
    except TemplateError as error:
        name = None if dataset.chat_template or keeps_template else family_of(own)
        if name is None or own is None or missing_tokens(name, tokenizer):
            raise
        if isinstance(own, str) and shipped_name(own):
            raise  # a shipped template, which has just been tried
        refusal = error
    reasons: list[str] = []
    for variant in FAMILIES[name].variants:
        template = shipped_template(name)
        known = reads(template, tokenizer)
        asked = {key: value for key, value in dataset.template_arguments.items() if key in known}
        tokenizer.chat_template = with_arguments(template, {**asked, **variant})
        try:
            done = work(own)
        except DataError as error:
            reasons.append(str(error))
            continue
        except BaseException:
            tokenizer.chat_template = own
            raise
        return done, [
            f"the tokenizer's own chat template cannot be trained on these rows ({refusal}); the "
            f"template {name} that comes with kpsvd-tune is used instead, which asks as the own "
            "one does in every row that both take. Evaluation and the saved adapter use it too"
        ]
    tokenizer.chat_template = own
    raise TemplateError(
        f"{refusal}. The template {name} that comes with kpsvd-tune was tried in its place and "
        f"does not do: {reasons[0]}"
    ) from refusal
