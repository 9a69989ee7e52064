"""Chat templates of real life: what is trained decodes to the assistant's texts and their ends."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import IGNORED, prepare
from kpsvd_tune.data.encode.encoder import Encoder, Learn, Mark
from kpsvd_tune.data.encode.format import Chat
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
# Written from what each family's texts look like. Name: template, end of a turn, special tokens.
TEMPLATES: dict[str, tuple[str, str, list[str]]] = {
    "chatml": (
        LOOP
        + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "llama 2": (
        "{% if messages[0].role == 'system' %}"
        "{% set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set lead = '' %}{% set turns = messages %}"
        "{% endif %}{% for m in turns %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (lead if loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        " </s>",
        [],
    ),
    "llama 3": (
        "{{ bos_token }}"
        + LOOP
        + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
        "+ '<|eot_id|>' }}" + END + "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}"
        + LOOP
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
        "+ m.content | trim + '<end_of_turn>\n' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "zephyr": (
        LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "</s>",
        [],
    ),
    "mistral": (
        "{{ bos_token }}{% if tools %}"
        "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
        + LOOP
        + "{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
        "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}" + END,
        "</s>",
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
    ),
    "generation markers": (
        LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
        + END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        ["<|im_start|>", "<|im_end|>"],
    ),
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight.\n\n(Insects: six.)"},
    {"role": "user", "content": "And «Ωμέγα»?"},
    {"role": "assistant", "content": "A letter – the last one 🕷"},
]
ANSWERS = [m["content"] for m in MESSAGES if m["role"] == "assistant"]


LEARN: tuple[Learn, ...] = ("all", "last")


def with_template(tokenizer: PreTrainedTokenizerFast, name: str) -> Any:
    template, _, special = TEMPLATES[name]
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    changed.add_special_tokens({"additional_special_tokens": special})
    return changed


def messages_for(name: str) -> list[dict[str, str]]:
    return MESSAGES[1:] if name == "gemma" else MESSAGES


def trained(encoder: Encoder, chat: Chat) -> list[str]:
    encoded = encoder.encode(chat, 1)
    assert Mark.INEXACT not in encoded.marks
    return [text for text, is_trained in encoder.pieces(encoded) if is_trained]


@pytest.mark.parametrize("name", TEMPLATES)
def test_trained_tokens_decode_to_the_assistants_texts(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    changed, end = with_template(tokenizer, name), TEMPLATES[name][1]
    chat = Chat(tuple(messages_for(name)))
    learnt = trained(Encoder(changed, "chat", 10_000), chat)
    assert [text.removeprefix(" ") for text in learnt] == [answer + end for answer in ANSWERS]
    last = trained(Encoder(changed, "chat", 10_000, learn="last"), chat)
    assert last == learnt[-1:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_learning_the_last_turn_only_hides_no_text(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    changed = with_template(tokenizer, name)
    chat = Chat(tuple(messages_for(name)))
    rows = [Encoder(changed, "chat", 10_000, learn=learn).encode(chat, 1) for learn in LEARN]
    texts = [changed.decode(each.input_ids.tolist()) for each in rows]
    assert texts[0] == texts[1]
    assert rows[0].num_supervised > rows[1].num_supervised


def test_a_template_that_forgets_earlier_turns_can_learn_the_last(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        LOOP + "{{ '<|' + m.role + '|>' }}{% if m.role == 'user' or loop.last %}{{ m.content }}"
        "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{{ eos_token }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    chat = Chat(
        tuple(
            {"role": role, "content": text}
            for role, text in (
                *(("user", "a"), ("assistant", "<think>x</think>b")),
                *(("user", "c"), ("assistant", "<think>y</think>d")),
            )
        )
    )
    with pytest.raises(DataError, match=r"changes earlier turns .*dataset\.learn: last"):
        Encoder(changed, "chat", 500).encode(chat, 1)
    assert trained(Encoder(changed, "chat", 500, learn="last"), chat) == ["<think>y</think>d</s>"]
    # What is asked in generation is the text before the answer in training, earlier turns included.
    row = Encoder(changed, "chat", 500, learn="last").encode(chat, 1)
    asked = Encoder(changed, "chat", 500).encode_prompt(chat.messages[:-1])
    assert asked == row.input_ids[: len(asked)].tolist()
    assert row.labels[len(asked) - 1] == IGNORED != row.labels[len(asked)]


def test_tools_and_their_results_are_kept_and_not_learnt(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "[call weather]"},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ],
        "tools": [{"name": "weather"}],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    changed = with_template(tokenizer, "mistral")
    data = prepare(DatasetRecipe(path=str(path), validation=0), changed, seed=0)
    assert data.report.sample == (
        (
            '<s>[AVAILABLE_TOOLS] [{"name": "weather"}][/AVAILABLE_TOOLS][INST] Weather?[/INST]',
            False,
        ),
        (" [call weather]</s>", True),
        ("[TOOL_RESULTS] sunny[/TOOL_RESULTS]", False),
        (" It is sunny.</s>", True),
    )


def test_a_template_that_refuses_is_told_with_the_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(
        DataError, match=r"line 1: .* refuses these messages: no system role; .*dataset\.chat_temp"
    ):
        prepare(DatasetRecipe(path=str(path), validation=0), changed, seed=0)


def test_a_tokenizer_that_changes_the_text_is_told_of(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from tokenizers import normalizers

    lower = copy.deepcopy(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    report = prepare(DatasetRecipe(path=str(path), validation=0), lower, seed=0).report
    assert (
        f"1 row whose text this tokenizer does not give back exactly (first: {path}, line 1)"
        in (report.warnings)
    )


def test_two_start_tokens_are_told_of(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    twice = copy.deepcopy(tokenizer)
    twice.chat_template = "{{ bos_token + bos_token }}" + tokenizer.chat_template
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    report = prepare(DatasetRecipe(path=str(path), validation=0), twice, seed=0).report
    assert any(
        warning.startswith("rows begin with '<s>' twice") and "take it out of the chat" in warning
        for warning in report.warnings
    )


def test_a_template_with_todays_date_is_told_of(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    report = prepare(DatasetRecipe(path=str(path), validation=0), dated, seed=0).report
    assert report.warnings[0].startswith("the chat template writes today's date into every row")


def test_a_tokenizer_without_end_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    none = copy.deepcopy(tokenizer)
    none.eos_token = None
    with pytest.raises(DataError, match="no end token .* set eos_token in the tokenizer's"):
        Encoder(none, "chat", 100)


def test_turns_without_an_end_are_told_of(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = tokenizer.chat_template.replace(" + eos_token", " + '\\n'")
    path = tmp_path / "rows.jsonl"
    for rounds, expected in ((1, False), (2, True)):
        path.write_text(json.dumps({"messages": MESSAGES[:1] + MESSAGES[1:3] * rounds}) + "\n")
        report = prepare(DatasetRecipe(path=str(path), validation=0), endless, seed=0).report
        assert expected == any("without an end token" in each for each in report.warnings)


@pytest.mark.parametrize("fault", ["1 // 0", "cycler()", "f()"])
def test_a_template_that_fails_is_refused_with_the_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, fault: str
) -> None:
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = f"{{% macro f() %}}{{{{ f() }}}}{{% endmacro %}}{{{{ {fault} }}}}"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    with pytest.raises(DataError, match="line 1: the tokenizer's chat template refuses"):
        prepare(DatasetRecipe(path=str(path), validation=0), broken, seed=0)
