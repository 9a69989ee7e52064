"""A conversation with a model: its history, and one answer after another as it is written.

Answers are streamed by transformers' own generation; :mod:`.generation` writes many at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from kpsvd_tune.data import Encoder
from kpsvd_tune.errors import InputError, NonFiniteError
from kpsvd_tune.evaluation.generation import (
    NO_LIMIT,
    GenerationOptions,
    LanguageModel,
    end_token_ids,
    evaluation_mode,
)
from kpsvd_tune.storage.memory import explained_memory

Ending = Literal["whole", "length", "stopped"]


class Conversation:
    """What was said so far between a user and a model.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        template: "chat" for the tokenizer's chat template; else the text template of a training, of
            which earlier questions and answers stand before the next like rows that are packed.
        options: How to decode; max_new_tokens, temperature and seed count.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        options: GenerationOptions,
    ) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._encoder = Encoder(tokenizer, template, max_length=NO_LIMIT)
        self._is_chat = template == "chat"
        self._ends = sorted(end_token_ids(model, tokenizer, options))
        self._ends = sorted({*self._ends, *self._encoder.end_token_ids})
        self.reset()
        torch.manual_seed(options.seed)

    def reset(self) -> None:
        """Forget all that was said."""
        self._messages: list[dict[str, str]] = []  # of a chat
        self._ids: list[int] = []  # of a text template: all that was said

    def ask(
        self, question: str, write: Callable[[str], None], is_stopped: Callable[[], bool]
    ) -> Ending:
        """Answer a question; `write` gets the text piece by piece, as soon as it is certain.

        What was written until `is_stopped` said so, or until KeyboardInterrupt came, stays in the
        history; a question that got no word of an answer does not.

        Raises:
            InputError: The conversation leaves no room in the model's context.
            NonFiniteError: The model's logits hold NaN.
            ResourceError: The memory does not hold the conversation.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        ids = self._encoder.encode_prompt(messages if self._is_chat else question)
        if not self._is_chat:
            ids = [*self._ids, *ids]
        room = self._room(ids)
        streamer = _Pieces(self._tokenizer, write)
        try:
            with (
                evaluation_mode(self._model),
                explained_memory(
                    f"answering at {len(ids)} tokens of conversation",
                    "/reset, which forgets the conversation so far",
                    "a lower --max-new-tokens",
                ),
            ):
                new = self._generate(ids, room, streamer, is_stopped)
        except KeyboardInterrupt:
            new = streamer.token_ids
        streamer.end()  # type: ignore[no-untyped-call]
        is_whole = bool(new) and new[-1] in self._ends
        said = new[:-1] if is_whole else new
        if said or is_whole:
            answer = self._tokenizer.decode(
                said, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            self._messages = [*messages, {"role": "assistant", "content": str(answer)}]
            self._ids = [*ids, *said, self._ends[0] if not is_whole else new[-1]]
        if is_whole:
            return "whole"
        return "length" if len(new) >= room else "stopped"

    def _room(self, ids: list[int]) -> int:
        context = getattr(self._model.config, "max_position_embeddings", None)
        room = NO_LIMIT if context is None else int(context) - len(ids)
        if not ids:
            raise InputError("the question holds no token: expected a text")
        if room < 1:
            raise InputError(
                f"the conversation is {len(ids)} tokens long, and the model's context holds "
                f"{context}: forget it with /reset, or ask something shorter"
            )
        return min(room, self._options.max_new_tokens)

    def _generate(
        self, ids: list[int], room: int, streamer: _Pieces, is_stopped: Callable[[], bool]
    ) -> list[int]:
        """The new tokens, the end token among them."""
        temperature = self._options.temperature
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        make_config: Any = GenerationConfig
        config = make_config(
            max_new_tokens=room,
            do_sample=temperature > 0,
            eos_token_id=self._ends,
            pad_token_id=self._ends[0],
            **sampling,
        )
        model: Any = self._model
        # What a model's own file says of penalties and the like would be taken beside these.
        for each in (model, getattr(model, "get_base_model", lambda: model)()):
            each.generation_config = config
        given = torch.tensor([ids], device=model.device)
        found: Tensor = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            generation_config=config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Stop(is_stopped)]),
            logits_processor=LogitsProcessorList([_RefuseNaN()]),
        )
        return [int(token) for token in found[0, len(ids) :].tolist()]


class _Pieces(TextStreamer):
    """Gives finished text to a function, and keeps the tokens for an answer that is broken off."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self._write = write
        self.token_ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token after another."""
        if not self.next_tokens_are_prompt:
            self.token_ids += value.flatten().tolist()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece on."""
        if text:
            self._write(text)


class _Stop(StoppingCriteria):
    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._is_stopped(), device=input_ids.device)


class _RefuseNaN(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool(scores.isnan().any()):
            raise NonFiniteError(
                "the model's logits are NaN. Expected finite numbers: the adapter may have "
                "diverged, or the dtype may be too narrow; try model.dtype=float32."
            )
        return scores
