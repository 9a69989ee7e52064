"""One batch of answers, token by token, with a key/value cache that shrinks as rows finish."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kpsvd_tune.errors import ModelError, NonFiniteError
from kpsvd_tune.evaluation.completions import RowId

if TYPE_CHECKING:
    from peft import PeftModel

LanguageModel: TypeAlias = "PreTrainedModel | PeftModel"


@dataclass
class Answer:
    """One answer being written.

    Attributes:
        id: of its prompt, for messages.
        prompt_ids: the prompt's tokens, at least one.
        max_new_tokens: the most tokens to write.
        draws: the source of its random numbers; None for greedy decoding.
        token_ids: what is written so far, without an end token.
    """

    id: RowId
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    draws: torch.Generator | None = None
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Ending:
    """What ends an answer before its length does: a token, or a text in what is written."""

    token_ids: frozenset[int]
    texts: tuple[str, ...] = ()


def decode_batch(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer],
    temperature: float,
    ending: Ending,
    after_step: Callable[[int, int], None],
) -> Iterator[int]:
    """Write the answers of one batch; the index of each is yielded as soon as it is finished.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's tokenizer.
        answers: written in place.
        temperature: 0 takes the likeliest token.
        ending: what ends an answer.
        after_step: called after each step with the tokens it wrote and the answers it finished.

    Raises:
        ModelError: the model returns no key/value cache.
        NonFiniteError: the model's logits hold NaN.
    """
    device = model.device
    tokens, mask = _left_padded(answers, tokenizer, ending)
    tokens, mask = tokens.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    known = _forward_parameters(model)
    extra: dict[str, Tensor | int] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    cache = None
    active = list(range(len(answers)))
    while True:
        if "position_ids" in known:
            extra["position_ids"] = positions
        with torch.no_grad():
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
        cache = output.past_key_values
        if cache is None:
            raise ModelError(
                f"{type(model).__name__} returned no key/value cache. Expected a causal language "
                "model of transformers that supports use_cache=True."
            )
        chosen = _choose(output.logits[:, -1], [answers[index] for index in active], temperature)
        going = [
            place
            for place, (index, token) in enumerate(zip(active, chosen, strict=True))
            if _goes_on(answers[index], token, tokenizer, ending)
        ]
        after_step(len(active), len(active) - len(going))
        if len(going) < len(active):
            staying = {active[place] for place in going}
            yield from (index for index in active if index not in staying)
            if not going:
                return
            # A finished row costs nothing any more.
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            mask, positions = mask[kept], positions[kept]
            active, chosen = [active[p] for p in going], [chosen[p] for p in going]
        tokens = torch.tensor(chosen, device=device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        positions = positions[:, -1:] + 1


def decode_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The tokens' text without special tokens, no space tidied away."""
    text = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)


def _left_padded(
    answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase, ending: Ending
) -> tuple[Tensor, Tensor]:
    """Prompts and their mask, (rows, longest) int64, the next token's place at the right."""
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = min(ending.token_ids, default=0)  # masked, so any token does
    width = max(len(answer.prompt_ids) for answer in answers)
    gaps = [width - len(answer.prompt_ids) for answer in answers]
    rows = [[padding] * gap + list(a.prompt_ids) for gap, a in zip(gaps, answers, strict=True)]
    real = [[0] * gap + [1] * (width - gap) for gap in gaps]
    return torch.tensor(rows), torch.tensor(real)


def _goes_on(
    answer: Answer, token: int, tokenizer: PreTrainedTokenizerBase, ending: Ending
) -> bool:
    """Add the token; whether more may follow."""
    if token in ending.token_ids:
        return False
    answer.token_ids.append(token)
    if len(answer.token_ids) >= answer.max_new_tokens:
        return False
    if not ending.texts:
        return True
    # A byte-level tokenizer may spend one token a byte; a little more covers split characters.
    window = max(len(text.encode()) for text in ending.texts) + 8
    tail = decode_text(tokenizer, answer.token_ids[-window:])
    return not any(text in tail for text in ending.texts)


def _choose(logits: Tensor, answers: Sequence[Answer], temperature: float) -> list[int]:
    """The next token of each row, from logits (rows, vocabulary)."""
    if bool(logits.isnan().any()):
        answer = answers[int(logits.isnan().any(dim=-1).nonzero()[0])]
        raise NonFiniteError(
            f"the model's logits are NaN for the prompt with id {answer.id!r} after "
            f"{len(answer.token_ids)} new tokens. Expected finite numbers: the adapter may have "
            "diverged, or the dtype may be too narrow; try model.dtype=float32."
        )
    if temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1).tolist()]
    # float32 on the CPU: one generator a row gives the same draws in every batch.
    scaled = logits.float().cpu() / temperature
    if not bool((scaled.isfinite() | ~logits.cpu().isfinite()).all()):
        # So low a temperature leaves the range of float32; relative to the largest none does.
        logits = logits.double().cpu()
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    shares = torch.softmax(scaled, dim=-1)
    return [
        int(torch.multinomial(share, 1, generator=answer.draws))
        for share, answer in zip(shares, answers, strict=True)
    ]


def _forward_parameters(model: LanguageModel) -> frozenset[str]:
    # An adapter's wrapper takes **kwargs; what it passes them to is the model that counts.
    unwrap = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    return frozenset(inspect.signature(base.forward).parameters)
