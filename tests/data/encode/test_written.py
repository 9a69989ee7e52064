"""What a chat template leaves out of a row is refused or told of, never lost in silence."""

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

ASK = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
LOOP = "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
END = "{{ eos_token }}{% endfor %}" + ASK
PLAIN = LOOP + "{{ m.content }}" + END
# Texts and calls, in the manner of several families; each writes one row rightly.
CALLS = {
    "json object": "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}",
    "name and arguments": "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + '(' }}{% for k, v in c.function.arguments.items() %}"
    "{{ k ~ '=' ~ v ~ ';' }}{% endfor %}{{ ')' }}{% endfor %}",
    "indented": "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + c.function.arguments | tojson(indent=4) }}{% endfor %}",
    "list": "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
}
# What is lost, and a template that loses it.
LOSES = {
    "the call of 'weather'": PLAIN,
    "the arguments or name": LOOP
    + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    + END,
    "the second call": LOOP
    + "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    + END,
    "the text beside the call": LOOP
    + "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}" + END,
    "the tool's answer": LOOP
    + "{% if m.role != 'tool' %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson }}{% endfor %}{% endif %}" + END,
}
THINK = "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
# Reasoning in the last turn only, its markers around whatever is left.
THINK_LAST = (
    LOOP + "{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last and m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{% endif %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}"
    "{% endif %}{% endfor %}" + ASK
)
USER = {"role": "user", "content": "Is it warm in Bonn and in Rome?"}
ANSWER = {"role": "assistant", "content": "Rome is warmer."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]

Read = Callable[..., PreparedData]


def calls(*cities: str, text: str = "") -> dict[str, Any]:
    made = [{"function": {"name": "weather", "arguments": {"city": c, "n": 1}}} for c in cities]
    return {"role": "assistant", "content": text, "tool_calls": made}


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Read:
    """Prepare rows; `template` is the chat template, other keywords keys of the dataset section."""

    def run(rows: list[Any], template: str, **keys: Any) -> PreparedData:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        path = tmp_path / "r.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = DatasetRecipe.model_validate({"path": str(path), "validation": 0, **keys})
        return prepare(recipe, changed, seed=0)

    return run


def learnt(data: PreparedData, row: int = 0) -> list[str]:
    return [text for text, is_trained in data.encoder.pieces(data.train[row]) if is_trained]


def conversation(**first: Any) -> dict[str, Any]:
    turn = {**calls("Bonn", "Rome", text="Let me see."), **first}
    return {"messages": [USER, turn, {"role": "tool", "content": "12, 21"}, ANSWER]}


@pytest.mark.parametrize("body", CALLS.values(), ids=CALLS)
def test_calls_that_the_template_writes_in_its_own_way_are_learnt(read: Read, body: str) -> None:
    first, last = learnt(read([conversation()], LOOP + body + END))
    assert first.startswith("Let me see.")
    assert first.count("weather") == 2
    assert "Bonn" in first
    assert "Rome" in first
    assert last == "Rome is warmer.</s>"


@pytest.mark.parametrize("what", LOSES)
def test_calls_texts_and_answers_that_the_template_loses_are_refused(read: Read, what: str) -> None:
    message = r"line 1: the chat template does not write .*dataset\.chat_template: the name"
    with pytest.raises(DataError, match=message) as got:
        read([conversation(content="Hm.")], LOSES[what])
    assert ("role 'tool'" in str(got.value)) == (what == "the tool's answer")


def test_a_call_in_a_turn_that_is_not_learnt_has_to_be_written_too(read: Read) -> None:
    rows = [conversation(weight=0)]
    with pytest.raises(DataError, match="line 1: the chat template does not write the call of"):
        read(rows, PLAIN)
    written = LOOP + CALLS["list"] + END
    assert learnt(read(rows, written)) == ["Rome is warmer.</s>"]
    assert learnt(read([conversation()], written, learn="last")) == ["Rome is warmer.</s>"]


def test_a_call_that_is_lost_in_a_later_row_is_refused_there(read: Read) -> None:
    template = (
        LOOP + "{{ m.content }}{% if loop.index < 4 %}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}{% endif %}" + END
    )
    later = {"messages": [USER, ANSWER, USER, calls("Bonn")]}
    assert len(read([conversation()], template).train) == 1
    with pytest.raises(DataError, match="line 2: the chat template does not write the call"):
        read([conversation(), later], template)


@pytest.mark.parametrize("key", ["function_call", "tool_calls"])
def test_the_older_form_of_a_call_is_the_same_call(read: Read, key: str) -> None:
    call = {"name": "weather", "arguments": '{"city": "Bonn"}'}
    value: Any = call if key == "function_call" else [{"type": "function", "function": call}]
    role = "function" if key == "function_call" else "tool"
    turn = {"role": "assistant", "content": None, key: value}
    answer = {"role": role, "name": "weather", "content": "12 degrees"}
    tools = {"functions": [TOOLS[0]["function"]]} if role == "function" else {"tools": TOOLS}
    row = {"messages": [USER, turn, answer, ANSWER], **tools}
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + LOOP + CALLS["list"] + END
    data = read([row], template)
    assert learnt(data) == [
        '[{"type": "function", "function": '
        '{"name": "weather", "arguments": {"city": "Bonn"}}}]</s>',
        "Rome is warmer.</s>",
    ]
    assert data.report.sample[0][0].startswith(json.dumps(TOOLS))
    assert "<|tool|>12 degrees</s>" in data.report.sample[2][0]
    with pytest.raises(DataError, match="does not write the call of 'weather'"):
        read([{"messages": row["messages"]}], PLAIN)


def test_a_call_in_both_forms_is_refused(read: Read) -> None:
    turn = {**calls("Bonn"), "function_call": {"name": "weather", "arguments": "{}"}}
    with pytest.raises(DataError, match="'function_call' of a message in 'messages' stands beside"):
        read([{"messages": [USER, turn]}], LOOP + CALLS["list"] + END)


@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_that_the_template_does_not_write_are_refused(read: Read, column: str) -> None:
    row = {"messages": [USER, ANSWER], column: TOOLS}
    with pytest.raises(DataError, match=r"line 1: .* the row's tools.*ignore_columns: \[tools\]"):
        read([row], PLAIN)
    assert learnt(read([row], PLAIN, ignore_columns=[column])) == ["Rome is warmer.</s>"]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_learnt_where_the_template_writes_it_and_else_refused(
    read: Read, key: str
) -> None:
    rows = [{"messages": [USER, {**ANSWER, key: "12 < 21"}]}]
    data = read(rows, LOOP + THINK + "{{ m.content }}" + END)
    assert learnt(data) == ["<think>12 < 21</think>Rome is warmer.</s>"]
    assert not any("adds text of its own" in each for each in data.report.warnings)
    # A place for reasoning that stays empty does not hold it.
    for template in (PLAIN, LOOP + "{% if m.reasoning_content %}<think></think>{% endif %}"
                     "{{ m.content }}" + END):  # fmt: skip
        with pytest.raises(DataError, match=rf"line 1: .* does not write '{key}' of an assistant"):
            read(rows, template)


@pytest.mark.parametrize("reasoning", ["4", "12 degrees are less than 21 degrees"])
def test_reasoning_that_the_answer_repeats_is_missed_all_the_same(
    read: Read, reasoning: str
) -> None:
    turn = {"role": "assistant", "content": f"{reasoning}.", "reasoning_content": reasoning}
    with pytest.raises(DataError, match="does not write 'reasoning_content'"):
        read([{"messages": [USER, turn]}], PLAIN)


def test_reasoning_that_is_left_out_of_earlier_turns_only(read: Read) -> None:
    thinks = {**ANSWER, "reasoning_content": "12 degrees are less than 21 degrees"}
    earlier = {**ANSWER, "reasoning_content": "Rome lies further south than Bonn"}
    rows = [{"messages": [USER, earlier, USER, thinks]}]
    with pytest.raises(DataError, match=r"dataset\.learn: each"):
        read(rows, THINK_LAST)
    whole = "<think>12 degrees are less than 21 degrees</think>Rome is warmer.</s>"
    data = read(rows, THINK_LAST, learn="last")
    assert learnt(data) == [whole]
    assert any("leaves the reasoning of turns that are not" in n for n in data.report.warnings)
    each = read(rows, THINK_LAST, learn="each")
    assert [learnt(each, row) for row in range(len(each.train))] == [
        ["<think>Rome lies further south than Bonn</think>Rome is warmer.</s>"],
        [whole],
    ]


@pytest.mark.parametrize("role", ["system", "developer", "tool", "user"])
def test_a_role_that_the_template_skips_is_refused(read: Read, role: str) -> None:
    skips = (
        "{% for m in messages if m.role != '"
        + role
        + "' %}"
        + PLAIN.removeprefix("{% for m in messages %}")
    )
    first = "tool" if role == "user" else role
    rows = [{"messages": [{"role": first, "content": "Be brief."}, USER, ANSWER]}]
    with pytest.raises(DataError, match=f"line 1: .* not write a message of the role '{role}'"):
        read(rows, skips)
    assert learnt(read(rows, PLAIN)) == ["Rome is warmer.</s>"]


@pytest.mark.parametrize("write", ["m.content | trim", "m.content | tojson", "m.content | upper"])
def test_texts_before_the_answer_may_be_written_in_another_way(read: Read, write: str) -> None:
    template = LOOP + "{{ m.content if m.role == 'assistant' else " + write + " }}" + END
    user = {"role": "user", "content": ' Say "hi".\nThen stop.\n'}
    assert learnt(read([{"messages": [user, ANSWER]}], template)) == ["Rome is warmer.</s>"]


def test_keys_that_the_template_does_not_write_are_named(read: Read) -> None:
    named = {**USER, "name": "Ann", "timestamp": 12, "empty": None, "none": ""}
    data = read([{"messages": [named, {**ANSWER, "id": "a1"}]}], PLAIN)
    found = [note for note in data.report.warnings if "does not write the key" in note]
    assert [note.split("'")[1] for note in found] == ["name", "timestamp", "id"]
    assert learnt(data) == ["Rome is warmer.</s>"]
    speaks = LOOP + "{{ (m.name + ': ' if m.name else '') + m.content }}" + END
    data = read([{"messages": [named, ANSWER]}], speaks)
    assert data.report.sample[0][0].startswith("<|user|>Ann: Is it warm")
    assert not any("'name'" in note for note in data.report.warnings)


def test_images_of_a_message_are_refused(read: Read) -> None:
    with pytest.raises(DataError, match=r"line 1: a message has 'images', .* only texts are"):
        read([{"messages": [{**USER, "images": ["a.png"]}, ANSWER]}], PLAIN)


def test_a_template_that_refuses_what_it_does_not_know_is_asked_part_by_part(read: Read) -> None:
    strict = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% if c.function.name != 'weather' %}{{ raise_exception('no such tool') }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    written = CALLS["name and arguments"]
    assert len(learnt(read([conversation()], strict + LOOP + written + END))) == 2
    lost = LOOP + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}" \
        "{% endfor %}" + END  # fmt: skip
    with pytest.raises(DataError, match="does not write the argument 'city' of the call of 'wea"):
        read([conversation()], strict + lost)


def test_arguments_that_are_plain_text_have_to_be_written_too(read: Read) -> None:
    turn = {"role": "assistant", "content": "", "tool_calls": [{"name": "w", "arguments": "Bonn"}]}
    rows = [{"messages": [USER, turn]}]
    calls = "{% for c in m.tool_calls or [] %}{{ c.name + %s }}{%% endfor %%}"
    calls = calls.replace("{% for", "{%% for", 1).replace("or [] %}", "or [] %%}")
    assert learnt(read(rows, LOOP + "{{ m.content }}" + calls % "c.arguments" + END)) == [
        "wBonn</s>"
    ]
    with pytest.raises(DataError, match="not write the arguments of the call of 'w'"):
        read(rows, LOOP + "{{ m.content }}" + calls % "'()'" + END)


def test_a_key_that_the_template_asks_for_is_no_unknown_one(read: Read) -> None:
    asks = (
        "{% for m in messages %}{% if m.role == 'user' and not m.name %}"
        "{{ raise_exception('who?') }}{% endif %}{% endfor %}"
    )
    data = read([{"messages": [{**USER, "name": "Ann"}, ANSWER]}], asks + PLAIN)
    assert not any("'name'" in note for note in data.report.warnings)


def called(*made: tuple[str, dict[str, Any]], text: str = "", **more: Any) -> dict[str, Any]:
    listed = [
        {"id": f"c{number}", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(made)
    ]
    return {"role": "assistant", "content": text, "tool_calls": listed, **more}


FIRST_CALL = LOSES["the second call"]
BY_NAME = "{% for t in tools or [] %}{{ t.function.name ~ ' ' }}{% endfor %}" + PLAIN
INSIDE = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}" \
    "{% else %}{{ m.content }}{% endif %}"  # fmt: skip


@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("second", ["price", "price_history"])
def test_a_call_that_equals_a_part_of_another_is_missed_all_the_same(
    read: Read, second: str, weight: int
) -> None:
    stock = {"symbol": "a stock with a long name"}
    turn = called((second, stock), ("price", stock), weight=weight)
    row = {"messages": [USER, turn, {"role": "tool", "content": "1"}, ANSWER]}
    with pytest.raises(DataError, match="line 1: the chat template does not write the call of"):
        read([row], FIRST_CALL)
    assert learnt(read([row], LOOP + CALLS["json object"] + END))[-1] == "Rome is warmer.</s>"


def test_a_result_that_the_answer_repeats_is_missed_all_the_same(read: Read) -> None:
    result = {"role": "tool", "content": "It is 21 degrees in Rome."}
    row = {"messages": [USER, called(("w", {"c": "Rome"})), result, {**result, **ANSWER,
           "content": result["content"]}]}  # fmt: skip
    with pytest.raises(DataError, match="not write a message of the role 'tool'"):
        read([row], LOSES["the tool's answer"])


def test_a_text_that_its_call_repeats_is_missed_all_the_same(read: Read) -> None:
    why = "I look for the weather in Bonn."
    row = {"messages": [USER, called(("w", {"why": why}), text=why)]}
    with pytest.raises(DataError, match="not write a message of the role 'assistant'"):
        read([row], LOSES["the text beside the call"])
    assert learnt(read([row], LOOP + CALLS["json object"] + END))[0].count(why) == 2


@pytest.mark.slow
def test_what_stands_outside_of_the_markers_is_not_lost_in_silence(read: Read) -> None:
    template = LOOP + INSIDE + CALLS["json object"].removeprefix("{{ m.content }}") + END
    with pytest.raises(DataError, match="call of 'w' outside of its {% generation %} markers"):
        read([{"messages": [USER, called(("w", {"c": "Bonn"}), text="Let me see.")]}], template)
    data = read([{"messages": [USER, {**ANSWER, "thinking": "12 < 21"}]}], LOOP + THINK + INSIDE
                + END)  # fmt: skip
    assert learnt(data) == ["Rome is warmer.</s>"]
    assert any("'thinking' outside of its {% gen" in note for note in data.report.warnings)


def test_every_tool_has_to_be_written(read: Read) -> None:
    described = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": described}, {"name": "time"}]
    first = "{% if tools %}{{ tools[0] | tojson }}{% endif %}" + PLAIN
    with pytest.raises(DataError, match=r"not write all of the row's tools \(missing: 'time'\)"):
        read([{"messages": [USER, ANSWER], "tools": tools}], first)
    rows = [{"messages": [USER, ANSWER], "tools": tools[:1]}] * 2
    notes = read(rows, BY_NAME).report.warnings
    found = [note.split("'")[1] for note in notes if "of tools: the model never sees" in note]
    assert found == ["description", "parameters"]
    strict = "{% if tools and tools[0].function.name != 'weather' %}{{ raise_exception('who?') }}" \
        "{% endif %}"  # fmt: skip
    assert len(read(rows, strict + BY_NAME).train) == 2


def test_tools_of_a_message_have_to_be_written(read: Read) -> None:
    system = {"role": "system", "content": "Be brief.", "tools": TOOLS}
    row = {"messages": [system, USER, ANSWER]}
    with pytest.raises(DataError, match=r"a message has 'tools', .*a column of the row \(tools\)"):
        read([row], PLAIN)
    written = LOOP + "{{ m.content }}{% if m.tools %}{{ m.tools | tojson }}{% endif %}" + END
    assert learnt(read([row], written)) == ["Rome is warmer.</s>"]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_results_in_another_order_than_their_calls(read: Read, order: list[int]) -> None:
    turn = called(("weather", {"city": "Bonn"}), ("weather", {"city": "Rome"}))
    results = [
        {"role": "tool", "tool_call_id": f"c{number}", "content": text}
        for number, text in enumerate(("12", "21"))
    ]
    row = {"messages": [USER, turn, *(results[place] for place in order), ANSWER]}
    template = LOOP + CALLS["json object"] + END
    with_ids = LOOP + "{{ m.tool_call_id or '' }}" + CALLS["json object"] + END
    assert len(read([row], with_ids).train) == 1
    if order == [0, 1]:
        assert len(read([row], template).train) == 1
        return
    with pytest.raises(DataError, match="line 1: the results of tools stand in another order"):
        read([row], template)


def test_a_call_whose_arguments_are_called_otherwise_is_refused_where_they_are_lost(
    read: Read,
) -> None:
    function = {"name": "weather", "parameters": {"city": "Bonn"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    row = {"messages": [USER, turn]}
    tolerant = (
        LOOP + "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | default({}) | tojson }}{% endfor %}{{ m.content }}" + END
    )
    with pytest.raises(DataError, match=r"not write the key 'parameters' of the call of 'weather'"):
        read([row], tolerant)
    assert "Bonn" in learnt(read([row], LOOP + CALLS["json object"] + END))[0]


@pytest.mark.parametrize("cut", ["[:40]", ".split('\\n')[0]", "[-40:]"])
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_text_that_the_template_cuts_is_refused(read: Read, cut: str, role: str) -> None:
    template = LOOP + "{{ m.content if m.role == 'assistant' else m.content" + cut + " }}" + END
    text = "Here is a list of all cities of two countries.\nWhich of them is warmest in May?"
    rows = [{"messages": [{"role": role, "content": text}, USER, ANSWER]}]
    with pytest.raises(DataError, match=f"not write a message of the role '{role}' as a whole"):
        read(rows, template)
    short = [{"messages": [{"role": role, "content": "Hi."}, {**USER, "content": "Hm?"}, ANSWER]}]
    assert learnt(read(short, PLAIN)) == ["Rome is warmer.</s>"]


def test_reasoning_in_the_text_of_an_earlier_turn_may_be_left_out(read: Read) -> None:
    template = (
        LOOP + "{{ m.content if m.role != 'assistant' or loop.last else "
        "m.content.split('</think>')[-1] }}" + END
    )
    earlier = {**ANSWER, "content": "<think>Rome lies further south.</think>Rome."}
    data = read([{"messages": [USER, earlier, USER, ANSWER]}], template, learn="last")
    assert learnt(data) == ["Rome is warmer.</s>"]


def test_a_text_that_the_template_changes_inside_is_told_of(read: Read) -> None:
    template = (
        LOOP + "{% if m.role == 'user' %}{{ m.content | replace('<image>', '') }}"
        "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
        + END
    )
    rows = [
        {"messages": [{"role": "user", "content": f"Look: <image> number {i}"}, ANSWER]}
        for i in range(2)
    ]
    notes = [note for note in read(rows, template).report.warnings if "changes texts" in note]
    assert len(notes) == 1
    assert "of user messages" in notes[0]
    assert "(first: 'Look: <image> number 0' is written as 'Look:  number 0')" in notes[0]
    # Text inside of JSON is the same text, and trimming changes nothing that is said.
    whole = [USER, ANSWER, {"role": "tool", "content": 'It is "ü"\n<12 degrees> '}, ANSWER]
    report = read([{"messages": whole}], template).report
    assert not any("changes texts" in note for note in report.warnings)
