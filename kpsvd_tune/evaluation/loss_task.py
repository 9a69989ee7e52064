"""The tasks that measure a loss instead of answers: loss and forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data import read_examples
from kpsvd_tune.evaluation.decode import LanguageModel
from kpsvd_tune.evaluation.loss import (
    RowProgress,
    TokenLoss,
    completion_loss,
    forgetting,
    read_text,
    text_loss,
)
from kpsvd_tune.recipe import EvaluationRecipe
from kpsvd_tune.report.results import Score


def score_loss(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: EvaluationRecipe,
    template: str,
    progress: RowProgress | None = None,
) -> list[Score]:
    """The scores of the tasks loss and forgetting; `n` counts tokens, nothing is unextractable.

    Args:
        model: a causal language model, adapter included, on its device.
        tokenizer: its tokenizer.
        recipe: the task, its file and the sizes. A .txt or .md file is one running text, every
            other source of the task loss holds rows with a prompt and a completion.
        template: text with {prompt} and {completion}, or "chat".
        progress: called with (done, total) rows or windows.

    Returns:
        For loss: loss and perplexity. For forgetting: the change of the loss against the base,
        and both losses. The standard error of a perplexity is that of its loss times itself.

    Raises:
        DataError: the file cannot be read or holds nothing to measure.
        InputError: forgetting was asked of a model without an adapter.
    """
    sizes: Mapping[str, Any] = {
        "batch_size": recipe.batch_size,
        "limit": recipe.limit,
        "progress": progress,
    }
    if recipe.task == "forgetting":
        text = Path(str(recipe.path))
        found = forgetting(model, tokenizer, text, window=recipe.window, **sizes)
        return [
            Score("loss_change", found.change, found.adapted.n, found.stderr),
            _score("loss", found.adapted),
            _score("base_loss", found.base),
        ]
    if is_text(recipe):
        text = Path(str(recipe.path))
        loss = text_loss(model, tokenizer, text, window=recipe.window, **sizes)
    else:
        loss = completion_loss(
            model,
            tokenizer,
            recipe.path or (),
            name=recipe.name,
            split=recipe.split,
            template=template,
            columns=_columns(recipe),
            learn=recipe.learn or "all",
            max_length=recipe.window,
            **sizes,
        )
    perplexity = loss.perplexity
    return [
        _score("loss", loss),
        Score("perplexity", perplexity, loss.n, perplexity * loss.stderr),
    ]


def check_loss(recipe: EvaluationRecipe) -> None:
    """Read what the task measures, so that a fault is found before the work begins.

    Raises:
        DataError: the file cannot be read.
    """
    if recipe.task == "forgetting" or is_text(recipe):
        read_text(str(recipe.path))
    else:
        read_examples(
            recipe.path or (),
            name=recipe.name,
            split=recipe.split,
            columns=_columns(recipe),
        )


def is_text(recipe: EvaluationRecipe) -> bool:
    """Whether the source is one running text rather than rows."""
    return isinstance(recipe.path, str) and Path(recipe.path).suffix.lower() in (".txt", ".md")


def _columns(recipe: EvaluationRecipe) -> dict[str, str]:
    return {role: str(name) for role, name in recipe.columns.items()}


def _score(name: str, loss: TokenLoss) -> Score:
    return Score(name, loss.value, loss.n, loss.stderr)
