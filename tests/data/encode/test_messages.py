"""Prompts and completions as messages, turns that are switched off, histories, nulls."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import PreparedData, prepare
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

TEMPLATE = (
    "{% if tools %}{{ '<|tools|>' + tools | tojson + eos_token }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}"
    "{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The same, with the template's own word on what is learnt.
MARKED = (
    "{% if tools %}{{ '<|tools|>' + tools | tojson + eos_token }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Read = Callable[..., PreparedData]


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM = say("system", "Be brief.")
HISTORY = [say("user", "1 + 1?"), say("assistant", "2")]
ASKED = [SYSTEM, *HISTORY, say("user", "2 + 3?")]
DONE = [say("assistant", "5"), say("user", "Sure?"), say("assistant", "Yes.")]


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Read:
    """Prepare rows; `template` is the chat template, other keywords keys of the dataset section."""

    def run(rows: list[Any], template: str = TEMPLATE, **keys: Any) -> PreparedData:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        path = tmp_path / "r.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = DatasetRecipe.model_validate({"path": str(path), "validation": 0, **keys})
        return prepare(recipe, changed, seed=0)

    return run


def learnt(data: PreparedData, row: int = 0) -> list[str]:
    return [text for text, is_trained in data.encoder.pieces(data.train[row]) if is_trained]


def whole(data: PreparedData, row: int = 0) -> str:
    return "".join(text for text, _ in data.encoder.pieces(data.train[row]))


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize(
    ("learn", "expected"), [("all", ["5</s>", "Yes.</s>"]), ("last", ["Yes.</s>"])]
)
def test_of_a_prompt_and_a_completion_in_messages_the_completion_is_learnt(
    read: Read, template: str, learn: str, expected: list[str]
) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    data = read([{"prompt": ASKED, "completion": DONE, "tools": tools}], template, learn=learn)
    assert learnt(data) == expected
    text = "".join(f"<|{m['role']}|>{m['content']}</s>" for m in [*ASKED, *DONE])
    assert whole(data) == f"<|tools|>{json.dumps(tools)}</s>{text}"
    assert data.report.format == "prompt-completion"


def test_each_learnt_turn_of_a_completion_may_be_a_row(read: Read) -> None:
    data = read([{"prompt": ASKED, "completion": DONE}], learn="each")
    assert [learnt(data, row) for row in range(len(data.train))] == [["5</s>"], ["Yes.</s>"]]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (ASKED, DONE[0]),
        (json.dumps(ASKED), json.dumps(DONE[:1])),
        (
            [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1 + 1?"},
             {"from": "gpt", "value": "2"}, {"from": "human", "value": "2 + 3?"}],
            {"from": "gpt", "value": "5"},
        ),
    ],
)  # fmt: skip
def test_other_ways_to_write_messages_of_a_pair(read: Read, prompt: Any, completion: Any) -> None:
    data = read([{"question": prompt, "answer": completion}],
                columns={"prompt": "question", "completion": "answer"})  # fmt: skip
    assert learnt(data) == ["5</s>"]
    assert whole(data).startswith("<|system|>Be brief.</s><|user|>1 + 1?</s><|assistant|>2</s>")


def test_a_system_column_stands_before_the_messages_of_a_prompt(read: Read) -> None:
    columns = {"prompt": "prompt", "completion": "completion", "system": "rules"}
    rows = [{"prompt": ASKED[1:], "completion": DONE[:1], "rules": "Be kind."}]
    data = read(rows, columns=columns)
    assert whole(data).startswith("<|system|>Be kind.</s><|user|>1 + 1?")
    assert learnt(data) == ["5</s>"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "2 + 3?", "completion": DONE}, "'completion' holds messages, and 'prompt' hol"),
        ({"prompt": ASKED, "completion": "5"}, "'prompt' holds messages, and 'completion' holds t"),
    ],
)
def test_messages_on_one_side_only_are_refused(
    read: Read, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"line 1: the column {message}.* rewrite one of them"):
        read([values])
    # In a later row the form is known already.
    whole_row = {"prompt": ASKED, "completion": DONE}
    with pytest.raises(
        DataError, match=r"line 2: the column .* (a JSON|expected a) list of messages"
    ):
        read([whole_row, values])


def test_a_completion_without_an_answer_is_dropped_though_its_prompt_has_one(read: Read) -> None:
    rows = [{"prompt": ASKED, "completion": DONE}, {"prompt": ASKED, "completion": []}]
    data = read(rows)
    assert len(data.train) == 1
    assert any("1 row dropped: empty, or without a comp" in note for note in data.report.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
@pytest.mark.parametrize("on", [{}, {"weight": 1}, {"train": True}, {"weight": None}])
def test_a_turn_that_is_switched_off_is_context(
    read: Read, template: str, off: dict[str, Any], on: dict[str, Any]
) -> None:
    first, second = say("assistant", "2", **off), say("assistant", "5", **on)
    rows = [{"messages": [HISTORY[0], first, say("user", "2 + 3?", train=False), second]}]
    data = read(rows, template)
    assert learnt(data) == ["5</s>"]
    assert whole(data) == "<|user|>1 + 1?</s><|assistant|>2</s><|user|>2 + 3?</s><|assistant|>5</s>"
    assert not any("key" in note for note in data.report.warnings)
    # The last turn that is learnt ends the row.
    rows = [
        {"messages": [HISTORY[0], say("assistant", "2"), ASKED[3], say("assistant", "x", **off)]}
    ]
    for learn in ("all", "last", "each"):
        data = read(rows, template, learn=learn)
        assert learnt(data) == ["2</s>"]
        assert whole(data) == "<|user|>1 + 1?</s><|assistant|>2</s>"


def test_a_switch_works_in_sharegpt_too_and_behind_a_system_column(read: Read) -> None:
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2", "weight": 0},
             {"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]  # fmt: skip
    assert learnt(read([{"conversations": turns, "system": "Be brief."}])) == ["5</s>"]


def test_a_row_whose_turns_are_all_switched_off_is_dropped(read: Read) -> None:
    off = {"messages": [HISTORY[0], say("assistant", "2", train=False)]}
    data = read([{"messages": HISTORY}, off])
    assert len(data.train) == 1
    assert any("1 row dropped" in note for note in data.report.warnings)


@pytest.mark.parametrize(
    ("role", "switch"),
    [
        ("assistant", {"weight": 0.5}),
        ("assistant", {"weight": True}),
        ("assistant", {"weight": "0"}),
        ("assistant", {"train": 1}),
        ("assistant", {"train": "false"}),
        ("assistant", {"trainable": False}),
        ("assistant", {"loss": True}),
        ("assistant", {"masked": True}),
        ("assistant", {"weight": 1, "train": False}),
        ("user", {"weight": 1}),
        ("user", {"train": True}),
    ],
)
def test_switches_that_are_not_understood_are_refused(
    read: Read, role: str, switch: dict[str, Any]
) -> None:
    messages = [{**m, **(switch if m["role"] == role else {})} for m in HISTORY]
    message = (
        r"line 1: .*expected weight: 0 or 1, or train: true or false, on assistant messages: .* re"
    )
    with pytest.raises(DataError, match=message) as got:
        read([{"messages": messages}])
    assert all(key in str(got.value) for key in switch) or role == "user"


ALPACA = {"instruction": "2 + 3?", "input": "", "output": "5", "history": [["1 + 1?", "2"]]}


@pytest.mark.parametrize("history", [[["1 + 1?", "2"]], '[["1 + 1?", "2"]]'])
def test_earlier_rounds_of_an_alpaca_row_are_turns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, history: Any
) -> None:
    path = tmp_path / "r.jsonl"
    rows = [
        {"instruction": "a", "output": "b", "system": "Be brief."},
        {**ALPACA, "history": history, "system": "Be brief."},
        {**ALPACA, "history": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"path": str(path), "validation": 0, "template": "chat"}
    data = prepare(DatasetRecipe.model_validate(keys), tokenizer, seed=0)
    assert [learnt(data, row) for row in range(3)] == [["b</s>"], ["2</s>", "5</s>"], ["5</s>"]]
    assert whole(data, 1) == (
        "<|system|>Be brief.</s><|user|>1 + 1?</s><|assistant|>2</s><|user|>2 + 3?</s>"
        "<|assistant|>5</s>"
    )
    data = prepare(DatasetRecipe.model_validate({**keys, "learn": "last"}), tokenizer, seed=0)
    assert learnt(data, 1) == ["5</s>"]
    text = "Q: {prompt}\nA: {completion}"
    with pytest.raises(DataError, match=r"line 2: the row has history.*dataset\.template: chat"):
        prepare(DatasetRecipe.model_validate({**keys, "template": text}), tokenizer, seed=0)
    cured = {**keys, "template": text, "ignore_columns": ["history"]}
    assert learnt(prepare(DatasetRecipe.model_validate(cured), tokenizer, seed=0), 1) == [" 5</s>"]


@pytest.mark.parametrize("history", ["once upon a time", [["a"]], [["a", 1]], {"a": "b"}])
def test_a_history_of_another_kind_is_refused(read: Read, history: Any) -> None:
    with pytest.raises(DataError, match=r"line 1: the column 'history' holds .* \[\[question, ans"):
        read([{**ALPACA, "history": history}])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": None, "completion": "5"},
        {"instruction": None, "input": "x", "output": "5"},
        {"messages": [say("user", None), say("assistant", "5")]},
        {"messages": [{"role": "user"}, say("assistant", "5")]},
        {"messages": [say("system", None), ASKED[3], say("assistant", "5")]},
        {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "5"}]},
    ],
)
def test_a_null_that_asks_nothing_is_refused(read: Read, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r'line 1: .*null.*expected text: remove .*write ""'):
        read([row])


def test_an_empty_prompt_and_a_null_answer_are_what_they_say(read: Read) -> None:
    rows = [
        {"prompt": "", "completion": "5"},
        {"prompt": "a", "completion": None},
        {"prompt": None, "completion": None},
    ]
    data = read(rows)
    assert len(data.train) == 1
    assert any("2 rows dropped: empty" in note for note in data.report.warnings)
    empty = [say("user", ""), say("assistant", "5")]
    assert learnt(read([{"messages": empty}])) == ["5</s>"]


def calling(arguments: Any, name: str = "weather") -> dict[str, Any]:
    call = {"id": None, "function": {"name": name, "arguments": arguments}}
    return {"messages": [ASKED[3], say("assistant", None, tool_calls=[call])]}


def tool(properties: Any, **filled: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, **filled}
    return {"type": "function", "function": {"name": "weather", "parameters": parameters}}


@pytest.mark.parametrize(
    ("arguments", "properties", "expected"),
    [
        ({"city": "Bonn", "day": None}, None, {"city": "Bonn"}),
        ({"city": "Bonn", "day": None}, {"city": {"type": "string"}}, {"city": "Bonn"}),
        ({"day": None}, {"day": {"type": "integer"}}, {}),
        ({"day": None}, {"day": {"type": ["integer", "null"]}}, {"day": None}),
        ({"day": None}, {"day": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}, {"day": None}),
        ({"day": None}, {"day": {"type": "integer", "nullable": True}}, {"day": None}),
        ({"day": None}, {"day": {"enum": [1, None]}}, {"day": None}),
        ({"at": {"city": "Bonn", "x": None}, "n": [{"y": None}]}, None,
         {"at": {"city": "Bonn"}, "n": [{}]}),
        ('{"day": null}', None, {"day": None}),
    ],
)  # fmt: skip
def test_null_arguments_that_nobody_gave_are_left_out(
    read: Read, arguments: Any, properties: Any, expected: dict[str, Any]
) -> None:
    row = calling(arguments)
    if properties is not None:
        row["tools"] = [tool(properties)]
    data = read([row])
    assert learnt(data) == [f"weather{json.dumps(expected)}</s>"]
    is_told = any("null arguments of tool calls are left out" in n for n in data.report.warnings)
    assert is_told == (isinstance(arguments, dict) and arguments != expected)


def test_nulls_that_arrow_fills_into_tools_are_left_out_and_a_default_stays(read: Read) -> None:
    day = {"type": "integer", "default": None}
    filled = {"type": "string", "default": None, "enum": None}
    row = {**calling({"city": "Bonn"}), "tools": [tool({"day": day, "city": filled}, strict=None)]}
    expected = [tool({"day": day, "city": {"type": "string"}})]
    assert whole(read([row])).startswith(f"<|tools|>{json.dumps(expected)}</s>")


def test_messages_and_calls_of_a_csv_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "r.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "completion"])
        writer.writerow([json.dumps(ASKED), json.dumps(DONE)])
    keys = {"path": str(path), "validation": 0}
    data = prepare(DatasetRecipe.model_validate(keys), tokenizer, seed=0)
    assert learnt(data) == ["5</s>", "Yes.</s>"]


@pytest.mark.parametrize("calls", ["weather", [["weather"]], {"name": "weather"}])
def test_calls_that_are_none_are_refused(read: Read, calls: Any) -> None:
    rows = [{"messages": [ASKED[3], say("assistant", "", tool_calls=calls)]}]
    with pytest.raises(DataError, match=r"line 1: 'tool_calls' of a message in 'messages' is "):
        read(rows)


def test_older_calls_without_a_name_are_refused(read: Read) -> None:
    rows = [{"messages": [ASKED[3], say("assistant", "", function_call="auto")]}]
    with pytest.raises(DataError, match=r"'function_call' of a message in 'messages' is 'auto'"):
        read(rows)


@pytest.mark.parametrize("key", ["prefix", "partial"])
def test_a_turn_that_is_marked_as_unfinished_is_refused(read: Read, key: str) -> None:
    rows = [{"messages": [*ASKED, say("assistant", "It is", **{key: True})]}]
    with pytest.raises(
        DataError, match=rf"line 1: .*{key}: true, .*beginning of an answer.*join it"
    ):
        read(rows)
    finished = read([{"messages": [*ASKED, say("assistant", "5", **{key: False})]}])
    assert learnt(finished) == ["2</s>", "5</s>"]
    assert not any(key in note for note in finished.report.warnings)
