"""Loss and perplexity on prompt-completion rows and on plain text, and what training forgot.

The mean is over tokens, not over rows or batches, so that it depends on neither the batch size
nor the padding; the standard error takes tokens as independent and is somewhat too small for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data import IGNORED, Encoder, TokenizedRow, collate, read_examples
from kpsvd_tune.data.encode.encoder import Mark
from kpsvd_tune.data.encode.format import Chat, Pair
from kpsvd_tune.data.rows.prepare import ReadRows
from kpsvd_tune.errors import DataError, InputError
from kpsvd_tune.evaluation.generation import LanguageModel, evaluation_mode
from kpsvd_tune.evaluation.own_keys import advising_own_keys
from kpsvd_tune.evaluation.tasks import Progress
from kpsvd_tune.recipe import EvaluationRecipe
from kpsvd_tune.report.results import Score
from kpsvd_tune.storage.json_files import check_regular
from kpsvd_tune.units import counted


@dataclass(frozen=True)
class TokenLoss:
    """Mean negative log likelihood of tokens, in nats."""

    value: float
    n: int  # tokens counted
    stderr: float  # standard error of the mean

    @property
    def perplexity(self) -> float:
        """exp(value)."""
        return math.exp(self.value) if self.value < 700 else math.inf


@dataclass(frozen=True)
class Forgetting:
    """How an adapter changed the loss on text it was not trained for."""

    base: TokenLoss
    adapted: TokenLoss
    change: float  # adapted minus base; above 0 where the model got worse
    stderr: float  # standard error of the change, token by token


def score_loss(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: EvaluationRecipe,
    template: str,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Score]:
    """The scores of the tasks loss and forgetting; `n` counts tokens, nothing is unextractable.

    `template` is text or "chat"; `progress` is told (done, total) rows or windows, `note` of
    rows that are not measured. A .txt or .md file is one running text, other sources of loss hold
    a prompt and a completion a row.

    Returns:
        For loss: loss and perplexity. For forgetting: the change of the loss against the base,
        and both losses. The standard error of a perplexity is that of its loss times itself.
    """
    text = Path(str(recipe.path))
    sizes: dict[str, Any] = {
        "window": recipe.window,
        "batch_size": recipe.batch_size,
        "limit": recipe.limit,
        "progress": progress,
    }
    if recipe.task == "forgetting":
        found = forgetting(model, tokenizer, text, **sizes)
        return [
            Score("loss_change", found.change, found.adapted.n, found.stderr),
            _score("loss", found.adapted),
            _score("base_loss", found.base),
        ]
    if _is_text(recipe):
        loss = text_loss(model, tokenizer, text, **sizes)
    else:
        with advising_own_keys(recipe):
            loss = completion_loss(model, tokenizer, recipe, template, progress, note)
    perplexity = Score("perplexity", loss.perplexity, loss.n, loss.perplexity * loss.stderr)
    return [_score("loss", loss), perplexity]


def check_loss(recipe: EvaluationRecipe) -> None:
    """Read what the task measures, so that a fault is found before the work begins."""
    if recipe.task == "forgetting" or _is_text(recipe):
        _read_text(str(recipe.path))
    else:
        with advising_own_keys(recipe):
            _read_rows(recipe)


def loss_examples(recipe: EvaluationRecipe) -> list[Pair | Chat]:
    """The examples whose loss is measured; none where the source is one running text."""
    if _is_text(recipe):
        return []
    with advising_own_keys(recipe):
        found = islice(_read_rows(recipe, recipe.template or "chat"), recipe.limit)
        return [example for _, example in found if example is not None]


def completion_loss(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: EvaluationRecipe,
    template: str,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> TokenLoss:
    """Loss on the completions of a file, encoded and masked exactly as in training.

    `recipe.window` tokens are left of each row; DataError where no token of a completion is. `note`
    is told of rows that are cut to it, or have nothing of their completion left.
    """
    found = _read_rows(recipe, template)
    # Chats take the chat template, as in training.
    used = "chat" if found.format.is_chat else template
    encoder = Encoder(tokenizer, used, recipe.window, learn=recipe.learn or "all")
    encoded = [
        encoder.encode(part, number)
        for number, (_, example) in enumerate(islice(found, recipe.limit))
        for part in ([] if example is None else encoder.parts(example))
    ]
    rows = [row for row in encoded if row.num_supervised]
    if not rows:
        raise DataError(
            f"{recipe.path} holds no completion to compute a loss on. Expected at least one row "
            f"whose completion begins within the first {recipe.window} tokens; check "
            f"{recipe.written('columns')}."
        )
    num_cut = sum(bool(row.marks & Mark.CUT) for row in rows)
    if note is not None and (num_cut or len(rows) < len(encoded)):
        note(
            f"of {counted(len(encoded), 'row')} {len(encoded) - len(rows)} are not measured, for "
            f"their prompts alone fill {recipe.written('window')} ({recipe.window} tokens), and "
            f"{num_cut} are cut to it"
        )
    return summarise(token_losses(model, tokenizer, rows, recipe.batch_size, progress))


def text_loss(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    window: int = 1024,
    batch_size: int = 4,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TokenLoss:
    """Loss on a UTF-8 text file, read as one stream in windows that do not overlap.

    A window has `window` tokens, at most the model's context. Its first token only conditions the
    rest and is not counted, so the figure depends on `window`: compare like with like. `limit`
    windows are taken, by default all, `batch_size` at a time; `progress` is told (done, total).

    Raises:
        DataError: the file is no readable UTF-8 text or has fewer than two tokens.
        InputError: the window is smaller than two tokens.
    """
    rows = text_windows(model, tokenizer, path, window)[:limit]
    return summarise(token_losses(model, tokenizer, rows, batch_size, progress))


def forgetting(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    window: int = 1024,
    batch_size: int = 4,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Forgetting:
    """Loss of a PEFT model and of its base on a UTF-8 text that the user cares about.

    It is read in windows of `window` tokens, `limit` at most; `progress` is told (done, total)
    windows, for the base and then for the adapter. InputError without an adapter.
    """
    disable_adapter: Any = getattr(model, "disable_adapter", None)
    if disable_adapter is None:
        raise InputError(
            f"{type(model).__name__} has no adapter, so there is nothing it could have forgotten. "
            "Expected a base model with an adapter; use text_loss for a model alone."
        )
    rows = text_windows(model, tokenizer, path, window)[:limit]
    with disable_adapter():
        base = token_losses(model, tokenizer, rows, batch_size, progress)
    adapted = token_losses(model, tokenizer, rows, batch_size, progress)
    change = summarise(adapted - base)
    return Forgetting(summarise(base), summarise(adapted), change.value, change.stderr)


def _read_text(path: str | Path) -> str:
    try:
        check_regular(Path(path))  # reading a pipe would wait for its writer
        # A byte order mark is no part of the text.
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}.") from error


def _is_text(recipe: EvaluationRecipe) -> bool:
    """Whether the source is one running text rather than rows."""
    return isinstance(recipe.path, str) and Path(recipe.path).suffix.lower() in (".txt", ".md")


def _read_rows(recipe: EvaluationRecipe, template: str = "chat") -> ReadRows:
    columns = {role: str(name) for role, name in recipe.columns.items()}
    return read_examples(
        recipe.path or (),
        name=recipe.name,
        split=recipe.split,
        columns=columns,
        ignore_columns=recipe.ignore_columns or (),
        template=template,
        setting=recipe.written("columns"),
    )


def _score(name: str, loss: TokenLoss) -> Score:
    return Score(name, loss.value, loss.n, loss.stderr)


def text_windows(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, path: Path, window: int
) -> list[TokenizedRow]:
    """A UTF-8 text file in windows that do not overlap, the first token of each not counted.

    A window has `window` tokens, at most the model's context. Raises as :func:`text_loss`.
    """
    if window < 2:
        raise InputError(f"window must be 2 tokens or more, got {window}.")
    text = _read_text(path)
    window = min(window, int(getattr(model.config, "max_position_embeddings", None) or window))
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) < 2:
        raise DataError(f"{path} holds {counted(len(ids), 'token')}; expected at least 2.")
    parts = [ids[start : start + window] for start in range(0, len(ids), window)]
    # The last of them may be a single token, which nothing predicts.
    return [
        TokenizedRow(part, (IGNORED, *part[1:]), number)
        for number, part in enumerate(parts)
        if len(part) > 1
    ]


def token_losses(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    progress: Progress | None = None,
) -> Tensor:
    """The loss of each counted token, float64, row by row in their order."""
    padding = tokenizer.pad_token_id or 0  # masked, so any token does
    losses: list[Tensor] = []
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], padding)
            batch = {name: values.to(model.device) for name, values in batch.items()}
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            labels = batch["labels"][:, 1:]
            # Row by row: the logits of a whole batch in float32 may not fit beside the model.
            for logits, row_labels in zip(output.logits[:, :-1], labels, strict=True):
                counted = row_labels != IGNORED
                row = cross_entropy(logits[counted].float(), row_labels[counted], reduction="none")
                losses.append(row.cpu().double())
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows))
    return torch.cat(losses)


def summarise(losses: Tensor) -> TokenLoss:
    """Mean, number and standard error of the losses of tokens."""
    n = losses.numel()
    spread = float(losses.std()) if n > 1 else 0.0
    return TokenLoss(float(losses.mean()), n, spread / math.sqrt(n))
