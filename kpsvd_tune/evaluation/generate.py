"""Text from a model: batched greedy or sampled decoding with a key/value cache.

A loop of our own instead of `transformers.generate`, for four reasons: nothing hidden in a model's
generation_config (repetition penalties, top-k) may change a score; a row that is finished leaves
the batch at once and is handed over at once; sampling does not depend on which rows share a
batch; and only the logits of the last position are ever computed.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.data import Encoder
from kpsvd_tune.errors import InputError, KpsvdTuneError
from kpsvd_tune.evaluation.completions import Completion, RowId
from kpsvd_tune.evaluation.decode import Answer, Ending, LanguageModel, decode_batch, decode_text
from kpsvd_tune.storage.memory import is_out_of_memory, out_of_memory

_NO_LIMIT = 2**31  # a prompt is never cut: one that does not fit is refused by name


@dataclass(frozen=True)
class Prompt:
    """One thing to answer: the token ids are what the model gets, the text is for people."""

    id: RowId
    text: str
    input_ids: tuple[int, ...]
    gold: Any = None


@dataclass(frozen=True)
class GenerationOptions:
    """How to decode.

    Attributes:
        max_new_tokens: the most tokens written for one prompt.
        batch_size: prompts decoded together.
        temperature: 0 takes the likeliest token; above 0 samples from softmax(logits / T).
        num_samples: answers to each prompt; more than one needs a temperature above 0.
        stop: an answer ends before the first of these texts in it.
        seed: with the row's id and sample number it fixes every draw, whatever the batch.
        end_token_ids: tokens that end an answer, besides those of tokenizer and model.
    """

    max_new_tokens: int = 256
    batch_size: int = 16
    temperature: float = 0.0
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0
    end_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot mean anything.

        Raises:
            InputError: a size below 1, a negative temperature, an empty stop string, or several
                samples of a greedy answer, which would all be equal.
        """
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


@dataclass(frozen=True)
class GenerationProgress:
    """How far a generation is; `seconds_left` is None until a first row is finished."""

    done: int
    total: int
    num_tokens: int
    tokens_per_second: float
    seconds_left: float | None


ProgressCallback = Callable[[GenerationProgress], None]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the earliest stop string in it; the whole text where there is none."""
    ends = [position for word in stop if (position := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


def generate_completions(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    *,
    done: Collection[tuple[RowId, int]] = frozenset(),
    progress: ProgressCallback | None = None,
) -> Iterator[Completion]:
    """Answer every prompt, each completion handed over as soon as it is finished.

    Prompts are decoded longest first, so that rows of a batch have like lengths and the largest
    batch, the one that may not fit into memory, comes first. In float32 the result does not depend
    on the batch size; in 16-bit dtypes rounding may differ between batch sizes.

    Args:
        model: a causal language model, adapter included; its training mode is restored.
        tokenizer: the model's tokenizer.
        prompts: what to answer; ids must be unique.
        options: how to decode.
        done: (id, sample) pairs that exist already and are left out.
        progress: called about once a second and after every finished row.

    Yields:
        Completions in the order they are finished, each (id, sample) once.

    Raises:
        InputError: a prompt is empty or leaves no room in the model's context.
        ModelError: the model returns no key/value cache.
        NonFiniteError: the model's logits hold NaN.
        ResourceError: the memory of host or device does not hold a batch.
    """
    wanted = [
        (prompt, sample)
        for prompt in sorted(prompts, key=lambda prompt: -len(prompt.input_ids))
        for sample in range(options.num_samples)
        if (prompt.id, sample) not in done
    ]
    answers = [
        Answer(
            prompt.id,
            prompt.input_ids,
            _room(model, prompt, options.max_new_tokens),
            _draws(options, prompt.id, sample),
        )
        for prompt, sample in wanted
    ]
    ending = Ending(_end_token_ids(model, tokenizer, options), options.stop)
    meter = _Meter(len(wanted), progress)
    with evaluation_mode(model):
        for start in range(0, len(wanted), options.batch_size):
            batch = answers[start : start + options.batch_size]
            try:
                for index in decode_batch(
                    model, tokenizer, batch, options.temperature, ending, meter.tick
                ):
                    prompt, sample = wanted[start + index]
                    text = _completion_text(tokenizer, batch[index], options.stop)
                    yield Completion(prompt.id, prompt.text, text, prompt.gold, sample)
            except Exception as error:
                if isinstance(error, KpsvdTuneError) or not is_out_of_memory(error):
                    raise
                raise out_of_memory(
                    error,
                    f"answering {len(batch)} prompts of up to {len(batch[0].prompt_ids)} tokens "
                    f"with up to {options.max_new_tokens} new ones (finished completions are kept)",
                    [
                        f"a lower batch_size of the evaluation (now {options.batch_size}): fewer "
                        "questions at a time",
                        f"a lower max_new_tokens (now {options.max_new_tokens}), or fewer shots",
                        "--dtype bfloat16 of `eval`: the model in half of float32's memory",
                    ],
                ) from error


def generate_text(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    template: str | None = None,
    options: GenerationOptions | None = None,
) -> str:
    """The model's answer to one prompt, without the prompt.

    Args:
        model: a causal language model, adapter included.
        tokenizer: the model's tokenizer.
        prompt: what to answer.
        template: the training template, text or "chat", to put the prompt in; None: the prompt
            is continued as it is.
        options: how to decode; greedy and 256 tokens by default.
    """
    options = options or GenerationOptions()
    encoder = Encoder(tokenizer, template or "{prompt}{completion}", max_length=_NO_LIMIT)
    question = Prompt(0, prompt, tuple(encoder.encode_prompt(prompt)))
    options = replace(options, end_token_ids=(*options.end_token_ids, *encoder.end_token_ids))
    return next(iter(generate_completions(model, tokenizer, [question], options))).completion


def _completion_text(
    tokenizer: PreTrainedTokenizerBase, answer: Answer, stop: Sequence[str]
) -> str:
    # Decoded behind its prompt: alone, a SentencePiece tokenizer drops the first space, which
    # is indentation when the answer is code.
    before = decode_text(tokenizer, answer.prompt_ids)
    whole = decode_text(tokenizer, [*answer.prompt_ids, *answer.token_ids])
    is_behind = whole.startswith(before)
    text = whole[len(before) :] if is_behind else decode_text(tokenizer, answer.token_ids)
    return cut_at_stop(text, stop)


def _room(model: LanguageModel, prompt: Prompt, max_new_tokens: int) -> int:
    """New tokens this prompt may get within the model's context."""
    if not prompt.input_ids:
        raise InputError(
            f"the prompt with id {prompt.id!r} holds no token. Expected at least one; give a text."
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return max_new_tokens
    room = int(context) - len(prompt.input_ids)
    if room < 1:
        raise InputError(
            f"the prompt with id {prompt.id!r} is {len(prompt.input_ids)} tokens long, but the "
            f"model's context holds {context}. Shorten it, or use fewer worked examples."
        )
    return min(max_new_tokens, room)


def _draws(options: GenerationOptions, identifier: RowId, sample: int) -> torch.Generator | None:
    if options.temperature == 0:
        return None
    name = f"{options.seed}/{type(identifier).__name__}/{identifier}/{sample}".encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def _end_token_ids(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, options: GenerationOptions
) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's, and the model's, which may be a list."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = of_model if isinstance(of_model, list) else [of_model]
    found = [tokenizer.eos_token_id, *listed, *options.end_token_ids]
    return frozenset(token for token in found if token is not None)


@contextmanager
def evaluation_mode(model: LanguageModel) -> Iterator[None]:
    """Switch dropout and the like off, and afterwards back to what it was.

    What is trained counts as frozen meanwhile: an adapter keeps what it stacked of factors that
    nobody may change, which makes answers faster.
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

    def __init__(self, total: int, callback: ProgressCallback | None) -> None:
        self.done, self.total, self.num_tokens = 0, total, 0
        self._callback = callback
        self._start = self._last = time.monotonic()

    def tick(self, num_tokens: int, num_finished: int) -> None:
        self.num_tokens += num_tokens
        self.done += num_finished
        now = time.monotonic()
        if self._callback is None or (num_finished == 0 and now - self._last < 1):
            return
        self._last = now
        seconds = max(now - self._start, 1e-9)
        rate = self.num_tokens / seconds
        left = seconds * (self.total - self.done) / self.done if self.done else None
        self._callback(GenerationProgress(self.done, self.total, self.num_tokens, rate, left))
