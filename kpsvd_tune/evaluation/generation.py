"""Text from a model: batched greedy or sampled decoding with a key/value cache.

A loop of our own instead of `transformers.generate`, for four reasons: nothing hidden in a model's
generation_config (repetition penalties, top-k) may change a score; a finished row leaves the batch,
and is yielded, at once; sampling does not depend on which rows share a batch; and only the logits
of the last position are computed.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kpsvd_tune.data import Encoder
from kpsvd_tune.errors import InputError, ModelError, NonFiniteError
from kpsvd_tune.evaluation.completions import Completion, RowId
from kpsvd_tune.storage.memory import explained_memory
from kpsvd_tune.units import counted, time_left

if TYPE_CHECKING:
    from peft import PeftModel

LanguageModel: TypeAlias = "PreTrainedModel | PeftModel"
NO_LIMIT = 2**31  # a prompt is never cut: one that does not fit is refused by its id


@dataclass(frozen=True)
class Prompt:
    """One thing to answer: the token ids are what the model gets, the text is for people."""

    id: RowId
    text: str
    input_ids: tuple[int, ...]
    gold: Any = None


@dataclass(frozen=True)
class GenerationOptions:
    """How to decode."""

    max_new_tokens: int = 256  # of one answer
    batch_size: int = 16  # prompts decoded together
    temperature: float = 0.0  # 0 takes the likeliest token; above: from softmax(logits / T)
    num_samples: int = 1  # answers to each prompt; several need a temperature above 0
    stop: tuple[str, ...] = ()  # an answer ends before the first of these texts in it
    tail: str = ""  # what a text template writes behind answers, taken off where one ends in it
    seed: int = 0  # with the row's id and sample number it fixes every draw, whatever the batch
    end_token_ids: tuple[int, ...] = ()  # besides those of tokenizer and model

    def __post_init__(self) -> None:
        """Refuse what cannot mean anything, such as several samples of a greedy answer."""
        for name in ("max_new_tokens", "batch_size", "num_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 or more, got {self.temperature}.")
        if "" in self.stop:
            raise InputError("stop holds an empty text, which would end every answer: remove it.")
        if self.num_samples > 1 and self.temperature == 0:
            raise InputError(
                f"num_samples is {self.num_samples} but temperature is 0, so all samples of a "
                "prompt would be equal. Set a temperature such as 0.8, or num_samples to 1."
            )


Progress = Callable[[int, int, str], None]  # told (answers done, in all, pace and time left)


@dataclass
class _Answer:
    """One answer being written: at most `max_new_tokens`, drawn from `draws` or greedy."""

    prompt: Prompt
    sample: int
    max_new_tokens: int
    draws: torch.Generator | None
    token_ids: list[int] = field(default_factory=list)  # without an end token


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the earliest stop string in it; the whole text where there is none."""
    ends = [position for word in stop if (position := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


def without_tail(text: str, tail: str) -> str:
    """An answer without what its template writes behind it; any other text stays as it is."""
    bare = text.rstrip()
    return bare.removesuffix(tail).rstrip() if tail and bare.endswith(tail) else text


def generate_completions(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    *,
    done: Collection[tuple[RowId, int]] = frozenset(),
    progress: Progress | None = None,
) -> Iterator[Completion]:
    """Answer every prompt not `done`, giving each completion as soon as it is finished.

    Prompts, of unique ids, are decoded longest first, so that rows of a batch have like lengths and
    the largest batch, which may not fit into memory, comes first. In float32 the result does not
    depend on the batch size; in 16-bit dtypes rounding may. `progress` is called about once a
    second and after every row. The model's training mode is restored.

    Raises:
        InputError: a prompt is empty or leaves no room in the model's context.
        ModelError: the model returns no key/value cache.
        NonFiniteError: the model's logits hold NaN.
        ResourceError: the memory of host or device does not hold a batch.
    """
    options = replace(options, end_token_ids=end_token_ids(model, tokenizer, options))
    answers = [
        _Answer(prompt, sample, _room(model, prompt, options), _draws(options, prompt.id, sample))
        for prompt in sorted(prompts, key=lambda prompt: -len(prompt.input_ids))
        for sample in range(options.num_samples)
        if (prompt.id, sample) not in done
    ]
    meter = _Meter(len(answers), progress)
    with evaluation_mode(model):
        for start in range(0, len(answers), options.batch_size):
            batch = answers[start : start + options.batch_size]
            with explained_memory(
                f"answering {counted(len(batch), 'prompt')} of up to "
                f"{len(batch[0].prompt.input_ids)} tokens "
                f"with up to {options.max_new_tokens} new ones (finished completions are kept)",
                f"a lower batch_size of the evaluation (now {options.batch_size}): fewer "
                "questions at a time",
                f"a lower max_new_tokens (now {options.max_new_tokens}), or fewer shots",
                "--dtype bfloat16 of `eval`: the model in half of float32's memory",
            ):
                for answer in _decode_batch(model, tokenizer, batch, options, meter):
                    yield _completion(tokenizer, answer, options)


def answer_one(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    template: str | None = None,
    options: GenerationOptions | None = None,
) -> Completion:
    """The model's answer to one prompt; by default greedy, up to 256 tokens.

    `template` is that of the training, a text or "chat", to put the prompt in; without one the
    prompt is continued as it is.
    """
    options = options or GenerationOptions()
    encoder = Encoder(tokenizer, template or "{prompt}{completion}", max_length=NO_LIMIT)
    question = Prompt(0, prompt, tuple(encoder.encode_prompt(prompt)))
    options = replace(options, end_token_ids=(*options.end_token_ids, *encoder.end_token_ids))
    return next(iter(generate_completions(model, tokenizer, [question], options)))


def _decode_batch(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[_Answer],
    options: GenerationOptions,
    meter: _Meter,
) -> Iterator[_Answer]:
    """Write the answers of one batch; each is yielded as soon as it is finished."""
    device = model.device
    tokens, mask = _left_padded(answers, tokenizer, options)
    tokens, mask = tokens.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    known = _forward_parameters(model)
    extra: dict[str, Tensor | int] = {}
    cache = None
    active = list(answers)
    while True:
        if "position_ids" in known:
            extra["position_ids"] = positions
        if "logits_to_keep" in known:
            width = tokens.shape[1]
            # Of prompts by its place and not by a count: of a slice, which has holes between its
            # rows, torch multiplies the head in bfloat16 on a CPU once a row, each with a copy of
            # the head's weights.
            by_place = width > 1 and device.type == "cpu"
            extra["logits_to_keep"] = torch.tensor([width - 1]) if by_place else 1
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
        chosen = _choose(output.logits[:, -1], active, options.temperature)
        going = [
            place
            for place, (answer, token) in enumerate(zip(active, chosen, strict=True))
            if _goes_on(answer, token, tokenizer, options)
        ]
        meter.tick(len(active), len(active) - len(going))
        if len(going) < len(active):
            staying = set(going)
            yield from (each for place, each in enumerate(active) if place not in staying)
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


def _left_padded(
    answers: Sequence[_Answer], tokenizer: PreTrainedTokenizerBase, options: GenerationOptions
) -> tuple[Tensor, Tensor]:
    """Prompts and their mask, (rows, longest) int64, the next token's place at the right."""
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = min(options.end_token_ids, default=0)  # masked, so any token does
    prompts = [torch.tensor(answer.prompt.input_ids) for answer in answers]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(prompts, padding_value=padding), pad([torch.ones_like(each) for each in prompts])


def _goes_on(
    answer: _Answer, token: int, tokenizer: PreTrainedTokenizerBase, options: GenerationOptions
) -> bool:
    """Add the token; whether more may follow."""
    if token in options.end_token_ids:
        return False
    answer.token_ids.append(token)
    if len(answer.token_ids) >= answer.max_new_tokens:
        return False
    if not options.stop:
        return True
    # A byte-level tokenizer may spend one token a byte; a little more covers split characters.
    window = max(len(text.encode()) for text in options.stop) + 8
    tail = _text(tokenizer, answer.token_ids[-window:])
    return not any(text in tail for text in options.stop)


def _choose(logits: Tensor, answers: Sequence[_Answer], temperature: float) -> list[int]:
    """The next token of each row, from logits (rows, vocabulary)."""
    if bool(logits.isnan().any()):
        answer = answers[int(logits.isnan().any(dim=-1).nonzero()[0])]
        raise NonFiniteError(
            f"the model's logits are NaN for the prompt with id {answer.prompt.id!r} after "
            f"{len(answer.token_ids)} new tokens. Expected finite numbers: the adapter may have "
            "diverged, or the dtype may be too narrow; try model.dtype=float32."
        )
    if temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1).tolist()]
    # float32 on the CPU: one generator a row gives the same draws in every batch.
    scaled = logits.float().cpu() / temperature
    if not bool((scaled.isfinite() | ~logits.cpu().isfinite()).all()):
        # So low a temperature leaves the range of float32; relative to the largest none does.
        logits = logits.cpu().double()
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


def _completion(
    tokenizer: PreTrainedTokenizerBase, answer: _Answer, options: GenerationOptions
) -> Completion:
    prompt, whole = answer.prompt, _completion_text(tokenizer, answer)
    text = without_tail(cut_at_stop(whole, options.stop), options.tail)
    # An end token is none of the tokens that were written.
    is_cut = len(answer.token_ids) >= answer.max_new_tokens and text == whole
    return Completion(prompt.id, prompt.text, text, prompt.gold, answer.sample, is_cut)


def _completion_text(tokenizer: PreTrainedTokenizerBase, answer: _Answer) -> str:
    # Decoded together with its prompt: alone, a SentencePiece tokenizer drops the first space,
    # which is indentation when the answer is code.
    prompt_ids = answer.prompt.input_ids
    before = _text(tokenizer, prompt_ids)
    whole = _text(tokenizer, [*prompt_ids, *answer.token_ids])
    is_behind = whole.startswith(before)
    return whole[len(before) :] if is_behind else _text(tokenizer, answer.token_ids)


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The tokens' text without special tokens, no space tidied away."""
    text = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)


def _room(model: LanguageModel, prompt: Prompt, options: GenerationOptions) -> int:
    """New tokens this prompt may get within the model's context."""
    if not prompt.input_ids:
        raise InputError(
            f"the prompt with id {prompt.id!r} holds no token. Expected at least one; give a text."
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return options.max_new_tokens
    room = int(context) - len(prompt.input_ids)
    if room < 1:
        raise InputError(
            f"the prompt with id {prompt.id!r} is {len(prompt.input_ids)} tokens long, but the "
            f"model's context holds {context}. Shorten it, or use fewer worked examples."
        )
    return min(options.max_new_tokens, room)


def _draws(options: GenerationOptions, identifier: RowId, sample: int) -> torch.Generator | None:
    if options.temperature == 0:
        return None
    name = f"{options.seed}/{type(identifier).__name__}/{identifier}/{sample}".encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def end_token_ids(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, options: GenerationOptions
) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's, and the model's, which may be a list."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = of_model if isinstance(of_model, list) else [of_model]
    found = [tokenizer.eos_token_id, *listed, *options.end_token_ids]
    return tuple({token for token in found if token is not None})


@contextmanager
def evaluation_mode(model: LanguageModel) -> Iterator[None]:
    """Switch dropout and the like off, and afterwards back to what it was.

    Trained weights count as frozen meanwhile, so that an adapter may keep stacked factors: faster.
    """
    was_training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train(False)
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)


class _Meter:
    """Counts rows and tokens and reports them, at most once a second between finished rows."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._num_tokens = 0, total, 0
        self._progress = progress
        self._start = self._last = time.monotonic()

    def tick(self, num_tokens: int, num_finished: int) -> None:
        self._num_tokens += num_tokens
        self._done += num_finished
        now = time.monotonic()
        if self._progress is None or (num_finished == 0 and now - self._last < 1):
            return
        self._last = now
        seconds = max(now - self._start, 1e-9)
        left = seconds * (self._total - self._done) / self._done if self._done else None
        parts = [f"{self._num_tokens / seconds:.0f} tokens/s", time_left(left)]
        self._progress(self._done, self._total, ", ".join(filter(None, parts)))
