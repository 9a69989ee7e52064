"""Train with one of our chat templates where the tokenizer's own cannot be trained.

Only where the recipe names none, and only where ours asks exactly as the tokenizer's own does, in
every row: what a model sees at inference is then the same with both, and what differs is that the
answers can be told from the rest, or that the own template refuses a form such as system messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data.encode.chat import TemplateError
from kpsvd_tune.data.encode.templates import (
    FAMILIES,
    Template,
    family_of,
    missing_tokens,
    reads,
    shipped_name,
    shipped_template,
    use_recipe_template,
    with_arguments,
)
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

T = TypeVar("T")


def with_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    dataset: DatasetRecipe,
    work: Callable[[Template | None], T],
    *,
    keeps_template: bool = False,
) -> tuple[T, list[str]]:
    """Do something with the tokenizer's chat template, or with one of ours where that fails.

    Args:
        tokenizer: Gets the template that is used in the end.
        dataset: The recipe's section.
        work: Called with None, or with the tokenizer's own template, which the one that it has
            now must be compared with.
        keeps_template: Look for no other template.

    Returns:
        What `work` returned, and what a user should know.

    Raises:
        TemplateError: Neither can be trained; the message is that of the tokenizer's own.
        DataError: The template that the recipe names does not exist, or fits not.
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
            raise  # it is one of ours, which has just been tried
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
