"""A conversation: what the model is shown, streaming, stopping, and what stays in the history."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kpsvd_tune.data import Encoder
from kpsvd_tune.errors import InputError, NonFiniteError
from kpsvd_tune.evaluation.conversation import Conversation
from kpsvd_tune.evaluation.generation import GenerationOptions, answer_one


def never() -> bool:
    return False


def talk(model: Any, tokenizer: Any, template: str = "chat", **options: Any) -> Conversation:
    return Conversation(model, tokenizer, template, GenerationOptions(12, **options))


def test_an_answer_is_that_of_generate_in_pieces(tiny_model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    ending = talk(tiny_model, tokenizer).ask("How many?", pieces.append, never)
    expected = answer_one(
        tiny_model, tokenizer, "How many?", template="chat", options=GenerationOptions(12)
    )
    assert "".join(pieces) == expected.completion
    assert ending in ("length", "whole")


@pytest.mark.parametrize("template", ["chat", "Q: {prompt}\nA: {completion}"])
def test_the_history_stands_before_the_next_question(
    tiny_model: Any, tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = talk(tiny_model, tokenizer, template)
    shown: list[list[int]] = []
    right = conversation._generate

    def watch(ids: list[int], *rest: Any) -> list[int]:
        shown.append(ids)
        return right(ids, *rest)

    monkeypatch.setattr(conversation, "_generate", watch)
    pieces: list[str] = []
    conversation.ask("One?", pieces.append, never)
    conversation.ask("Two?", pieces.append, never)
    conversation.reset()
    conversation.ask("One?", pieces.append, never)
    first, second, again = (tokenizer.decode(ids) for ids in shown)
    assert first in second
    assert "Two?" in second.removeprefix(first)
    assert second.endswith("<|assistant|>" if template == "chat" else "A:")
    assert first == again
    assert shown[0] == Encoder(tokenizer, template, 512).encode_prompt(
        [{"role": "user", "content": "One?"}] if template == "chat" else "One?"
    )


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(
    tiny_model: Any, tokenizer: Any
) -> None:
    conversation = talk(tiny_model, tokenizer)
    pieces: list[str] = []
    asked = iter([False, False, True])
    assert conversation.ask("One?", pieces.append, lambda: next(asked)) == "stopped"
    assert [each["role"] for each in conversation._messages] == ["user", "assistant"]
    assert conversation._messages[1]["content"] == "".join(pieces)


def test_a_second_ctrl_c_breaks_off_at_once(tiny_model: Any, tokenizer: Any) -> None:
    conversation = talk(tiny_model, tokenizer)

    asked = iter([False, False])

    def interrupt() -> bool:
        for answer in asked:
            return answer
        raise KeyboardInterrupt

    pieces: list[str] = []
    assert conversation.ask("One?", pieces.append, interrupt) == "stopped"
    assert len(conversation._messages) == 2
    assert tiny_model.training is False


def test_sampling_is_seeded(tiny_model: Any, tokenizer: Any) -> None:
    found = []
    for seed in (1, 1, 2):
        pieces: list[str] = []
        talk(tiny_model, tokenizer, temperature=1.5, seed=seed).ask("One?", pieces.append, never)
        found.append("".join(pieces))
    assert found[0] == found[1] != found[2]


def test_a_hidden_setting_of_the_model_changes_nothing(tiny_model: Any, tokenizer: Any) -> None:
    found = []
    for penalty in (1.0, 50.0):
        tiny_model.generation_config.repetition_penalty = penalty
        pieces: list[str] = []
        talk(tiny_model, tokenizer).ask("One?", pieces.append, never)
        found.append("".join(pieces))
    assert found[0] == found[1]


def test_a_conversation_that_fills_the_context_is_refused(tiny_model: Any, tokenizer: Any) -> None:
    conversation = talk(tiny_model, tokenizer)
    with pytest.raises(InputError, match=r"is \d+ tokens long, .* holds 512: forget it with"):
        conversation.ask("word " * 200, print, never)
    assert conversation._messages == []


def test_logits_that_are_no_numbers_are_an_error(tiny_model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the model's logits are NaN"):
        talk(tiny_model, tokenizer).ask("One?", print, never)


def test_a_question_without_a_token_is_refused(tiny_model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="the question holds no token"):
        talk(tiny_model, tokenizer, "{prompt}{completion}").ask("", print, never)
