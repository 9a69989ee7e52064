"""Tools, their calls, and turns that say nothing: what of them is learnt, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import PreparedData, prepare
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

USER = {"role": "user", "content": "Weather?"}
ANSWER = {"role": "assistant", "content": "Sunny."}
SILENT = {"role": "assistant", "content": " "}
# As many templates do: tools and arguments as JSON, calls end with a token of their own.
TEMPLATE = (
    "{% if tools %}{{ '<|tools|>' + tools | tojson + eos_token }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|call|>' if m.tool_calls else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The same with the template's own word on what is learnt.
MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Read = Callable[..., PreparedData]


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments, **more}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Read:
    """Prepare rows; `template` is the chat template, other keywords keys of the dataset section."""

    def run(rows: list[Any], template: str = TEMPLATE, **keys: Any) -> PreparedData:
        changed = copy.deepcopy(tokenizer)
        changed.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
        changed.chat_template = template
        path = tmp_path / "r.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = DatasetRecipe.model_validate({"path": str(path), "validation": 0, **keys})
        return prepare(recipe, changed, seed=0)

    return run


def learnt(data: PreparedData) -> list[str]:
    return [text for text, is_trained in data.encoder.pieces(data.train[0]) if is_trained]


@pytest.mark.parametrize("arguments", [{"city": "Bonn"}, '{"city": "Bonn"}'])
def test_arguments_are_learnt_as_an_object_also_where_a_row_holds_their_json(
    read: Read, arguments: Any
) -> None:
    tool = {"role": "tool", "content": "sun"}
    data = read([{"messages": [USER, call(arguments), tool, ANSWER]}])
    assert learnt(data) == ['weather{"city": "Bonn"}<|call|>', "Sunny.</s>"]


def test_arguments_that_are_no_json_object_stay_as_they_are(read: Read) -> None:
    assert learnt(read([{"messages": [USER, call("Bonn")]}])) == ['weather"Bonn"<|call|>']


def test_a_chat_may_end_with_a_call(read: Read) -> None:
    assert learnt(read([{"messages": [USER, call({"city": "Bonn"})]}], learn="last")) == [
        'weather{"city": "Bonn"}<|call|>'
    ]


@pytest.mark.parametrize("tools", [[{"name": "weather"}], '[{"name": "weather"}]'])
def test_tools_are_read_from_a_list_and_from_its_json(read: Read, tools: Any) -> None:
    turns = [{"from": "human", "value": "Weather?"}, {"from": "gpt", "value": "Sunny."}]
    data = read([{"conversations": turns, "tools": tools}])
    assert data.report.sample[0][0].startswith('<|tools|>[{"name": "weather"}]</s>')


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("weather", r"line 1: the column 'tools' is text and not JSON .* correct it"),
        ({"name": "weather"}, r"line 1: the column 'tools' holds dict .* write \[\.\.\.\] around"),
        ('{"name": "weather"}', r"line 1: the column 'tools' holds dict"),
    ],
)
def test_tools_that_cannot_be_read_are_refused(read: Read, tools: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read([{"messages": [USER, ANSWER], "tools": tools}])


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_no_fault(read: Read, tools: Any) -> None:
    assert learnt(read([{"messages": [USER, ANSWER], "tools": tools}])) == ["Sunny.</s>"]


def test_keys_that_arrow_fills_in_are_not_learnt(
    read: Read, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    rows = [{"messages": [USER, call(arguments)]} for arguments in ({"city": "Bonn"}, {"day": 1})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert learnt(read(rows, path=str(tmp_path / "r.parquet"))) == [
        'weather{"city": "Bonn"}<|call|>'
    ]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
@pytest.mark.parametrize("learn", ["all", "last"])
def test_a_turn_that_says_nothing_is_not_learnt(read: Read, template: str, learn: str) -> None:
    for messages in ([USER, ANSWER, USER, SILENT], [USER, SILENT, USER, ANSWER]):
        assert learnt(read([{"messages": messages}], template, learn=learn)) == ["Sunny.</s>"]


def test_half_a_surrogate_pair_in_a_message_is_refused_with_its_row(read: Read) -> None:
    half = {"role": "assistant", "content": "\ud83d"}
    with pytest.raises(DataError, match=r"line 1: the column 'messages' has half a surrogate"):
        read([{"messages": [USER, half]}])


@pytest.mark.parametrize("arguments", ["", " ", "null", None])
def test_a_call_without_arguments_has_an_empty_object(read: Read, arguments: Any) -> None:
    (taught, _) = learnt(read([{"messages": [USER, call(arguments), ANSWER]}]))
    assert taught == "weather{}<|call|>"


@pytest.mark.parametrize("name", [None, "", 3])
def test_a_call_without_a_name_is_refused(read: Read, name: Any) -> None:
    with pytest.raises(DataError, match="line 1: a call of a tool has no name: "):
        read([{"messages": [USER, call({"city": "Bonn"}, name=name)]}])


def test_tools_may_be_json_texts_in_a_list(read: Read) -> None:
    row = {"messages": [USER, ANSWER], "tools": ['{"name": "weather"}']}
    assert read([row]).report.sample[0][0].startswith('<|tools|>[{"name": "weather"}]')
    with pytest.raises(DataError, match=r"expected a list of tools, each an object: correct it"):
        read([{**row, "tools": ["weather"]}])


def test_special_tokens_in_calls_are_warned_of(read: Read) -> None:
    warnings = read([{"messages": [USER, call({"city": "a</s>b"}), ANSWER]}]).report.warnings
    assert any("1 row with the text of a special token" in each for each in warnings)


def test_what_many_rows_have_in_common_is_told_once(read: Read) -> None:
    rows = [{"messages": [USER, call({"city": "Bonn", "n": None}), ANSWER]}] * 3
    found = [each for each in read(rows).report.warnings if each.startswith("null arguments")]
    assert len(found) == 1
    assert "line 1, weather)" in found[0]


def test_a_turn_that_only_thinks_is_told_of(read: Read) -> None:
    thinks = {"role": "assistant", "content": "", "reasoning_content": "Bonn is in the north."}
    data = read([{"messages": [USER, thinks, USER, ANSWER]}] * 2)
    assert learnt(data) == ["Sunny.</s>"]
    found = [each for each in data.report.warnings if "reasoning alone" in each]
    assert len(found) == 1
    assert "line 1): join each" in found[0]


@pytest.mark.parametrize("text", ["\u200b", "\ufeff \u200d", "\x00"])
def test_a_turn_of_invisible_characters_is_not_learnt(read: Read, text: str) -> None:
    row = {"messages": [USER, {**ANSWER, "content": text}, USER, ANSWER]}
    assert learnt(read([row])) == ["Sunny.</s>"]


def test_a_greeting_that_is_not_learnt_may_come_first(read: Read) -> None:
    greeting = {"role": "assistant", "content": "Hello!"}
    assert learnt(read([{"messages": [{**greeting, "weight": 0}, USER, ANSWER]}])) == ["Sunny.</s>"]
    with pytest.raises(DataError, match="the chat starts with the assistant"):
        read([{"messages": [greeting, USER, ANSWER]}])
