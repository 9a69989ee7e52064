"""Forms of messages that other tools write: parts, calls as turns, arguments as text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import prepare
from kpsvd_tune.data.encode.templates import shipped_template
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

CALL = {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city."}}]
WRITTEN = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
)


def chatml(tokenizer: PreTrainedTokenizerFast) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    changed.chat_template = shipped_template("chatml")
    return changed


def sample(tmp_path: Path, tokenizer: Any, row: dict[str, Any]) -> list[tuple[str, bool]]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    data = prepare(DatasetRecipe(path=str(path), validation=0, max_length=4000), tokenizer, seed=0)
    return list(data.report.sample)


def test_parts_of_text_are_one_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a ", "image_url": None}, "b", {"text": " c"}]
    for kind, speakers in (("role", ("user", "assistant")), ("from", ("human", "gpt"))):
        key, text = ("messages", "content") if kind == "role" else ("conversations", "value")
        row = {
            key: [
                {kind: speakers[0], text: [{"type": "input_text", "text": "q"}]},
                {kind: speakers[1], text: parts},
            ]
        }
        assert sample(tmp_path, tokenizer, row) == [
            ("<|user|>q</s><|assistant|>", False),
            ("a b c</s>", True),
        ]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "a part of the type 'image_url'"),
        ({"type": "image"}, "a part of the type 'image'"),
        ({"type": "text", "text": "a", "image": "a.png"}, "a part of the type 'image'"),
        ({"type": "text", "text": None}, "a part {'type': 'text', 'text': None}"),
        (3, "a part 3"),
    ],
)
def test_other_parts_are_refused_by_name(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, part: Any, message: str
) -> None:
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}, part]},
            {"role": "assistant", "content": "a"},
        ]
    }
    with pytest.raises(DataError, match=f"line 1: 'content' of a message .* has {message}; expec"):
        sample(tmp_path, tokenizer, row)


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("is_text", [False, True])
def test_a_call_as_a_turn_of_its_own_is_a_call(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, is_list: bool, is_text: bool
) -> None:
    call: dict[str, Any] = dict(CALL)
    if is_text:
        call["arguments"] = json.dumps(call["arguments"])
    row = {
        "conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": json.dumps([call] if is_list else call)},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "tools": json.dumps(TOOLS),
    }
    found = sample(tmp_path, chatml(tokenizer), row)
    assert [text for text, is_trained in found if is_trained] == [
        f"{WRITTEN}<|im_end|>",
        "It is sunny.<|im_end|>",
    ]
    assert "<tool_response>\nsunny\n</tool_response>" in found[2][0]


@pytest.mark.parametrize("value", ["hello", '{"name": "f"}', '["f"]', "[]x", '{"arguments": {}}'])
def test_a_turn_that_is_no_call_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, value: str
) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": value},
        ]
    }
    with pytest.raises(DataError, match=r"from 'function_call' .* holds .*; expected JSON such"):
        sample(tmp_path, chatml(tokenizer), row)


def test_a_call_in_two_places_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(CALL), "tool_calls": [CALL]},
        ]
    }
    with pytest.raises(DataError, match="has 'tool_calls' besides"):
        sample(tmp_path, chatml(tokenizer), row)


# How a template may write arguments, and what the model must learn in each case.
WRITINGS = {
    "joined": "c.function.name + ' ' + c.function.arguments",
    "shown": "c.function.name ~ ' ' ~ c.function.arguments",
    "json": "c.function.name + ' ' + (c.function.arguments | tojson)",
}


@pytest.mark.parametrize("writing", WRITINGS)
def test_arguments_are_json_in_whichever_form_a_template_takes_them(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, writing: str
) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ " + WRITINGS[writing] + " }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    call = {"type": "function", "function": CALL}
    row = {
        "messages": [
            # What Python would show stands in a message too, and stays as it is.
            {"role": "user", "content": str(CALL["arguments"])},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "a"},
        ]
    }
    found = sample(tmp_path, changed, row)
    assert found[0][0] == f"<|user|>{CALL['arguments']}</s><|assistant|>"
    assert found[1] == ('weather {"city": "Zürich", "days": 2}</s>', True)
