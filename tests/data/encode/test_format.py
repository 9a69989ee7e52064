"""The form of the rows: detection with its reason, and the message when nothing fits."""

from __future__ import annotations

from typing import Any

import pytest

from kpsvd_tune.data.encode.format import Chat, Pair, RowFormat, find_format
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def row(**values: Any) -> Row:
    return Row("rows.jsonl", 1, values)


def find(values: dict[str, Any], name: str = "auto", **columns: str) -> RowFormat:
    return find_format([row(**values)], name, columns)


@pytest.mark.parametrize(
    ("values", "columns", "name", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, {}, "prompt-completion", "have the columns prompt"),
        (
            {"question": "a", "answer": "b"},
            {"prompt": "question", "completion": "answer"},
            "prompt-completion",
            "dataset.columns names prompt and completion",
        ),
        ({"instruction": "a", "input": "", "output": "b"}, {}, "alpaca", "instruction and output"),
        ({"messages": MESSAGES}, {}, "chat", "'messages' holds messages with role and content"),
        ({"dialog": MESSAGES}, {}, "chat", "'dialog' holds messages with role and content"),
        ({"conversations": TURNS}, {}, "sharegpt", "'conversations' holds messages with from"),
        ({"conversations": MESSAGES}, {}, "chat", "'conversations' holds messages with role"),
        ({"x": TURNS}, {"conversations": "x"}, "sharegpt", "columns names conversations"),
        ({"text": "a", "url": "b"}, {}, "text", "have the column text, and none for an answer"),
        ({"body": "a"}, {"text": "body"}, "text", "columns names text"),
    ],
)
def test_form_is_detected_with_its_reason(
    values: dict[str, Any], columns: dict[str, str], name: str, reason: str
) -> None:
    found = find(values, **columns)
    assert found.name == name
    assert reason in found.reason


def test_first_row_that_is_not_empty_decides() -> None:
    rows = [row(prompt="", completion=None), row(prompt="a", completion="b")]
    assert find_format(rows, "auto", {}).name == "prompt-completion"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, Pair("a", "b")),
        ({"prompt": "a", "completion": 42}, Pair("a", "42")),
        ({"text": "a"}, Pair("", "a", is_plain=True)),
        ({"instruction": "do", "input": "this", "output": "b"}, Pair("do\n\nthis", "b")),
        ({"instruction": "do", "input": None, "output": "b"}, Pair("do", "b")),
        ({"instruction": "do", "output": "b", "system": "s"}, Pair("do", "b", "s")),
        ({"messages": MESSAGES}, Chat(tuple(MESSAGES))),
        ({"conversations": TURNS}, Chat(tuple(MESSAGES))),
        (
            {"conversations": TURNS, "system": "s"},
            Chat(({"role": "system", "content": "s"}, *MESSAGES)),
        ),
        ({"messages": MESSAGES, "tools": [{"n": 1}]}, Chat(tuple(MESSAGES), ({"n": 1},))),
    ],
)
def test_rows_become_examples(values: dict[str, Any], expected: Pair | Chat) -> None:
    assert find(values).example(row(**values)) == expected


def test_a_column_called_system_is_not_a_system_prompt_unless_named() -> None:
    values = {"prompt": "a", "completion": "b", "system": "linux"}
    assert find(values).example(row(**values)) == Pair("a", "b")
    named = find(values, prompt="prompt", completion="completion", system="system")
    assert named.example(row(**values)) == Pair("a", "b", "linux")


def test_messages_as_json_text_are_read() -> None:
    values = {"messages": '[{"role": "user", "content": "hi"}, '
                          '{"role": "assistant", "content": "hello"}]'}  # fmt: skip
    assert find(values).example(row(**values)) == Chat(tuple(MESSAGES))


def test_null_keys_of_messages_are_dropped() -> None:
    messages = [{**message, "tool_calls": None} for message in MESSAGES]
    assert find({"messages": messages}).example(row(messages=messages)) == Chat(tuple(MESSAGES))


def test_columns_reach_into_objects() -> None:
    values = {"data": {"q": "a", "a": "b"}}
    found = find(values, prompt="data.q", completion="data.a")
    assert found.example(row(**values)) == Pair("a", "b")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prompt": "", "completion": ""},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": None},
        {"prompt": "a", "completion": " \n"},
    ],
)
def test_rows_without_anything_to_learn_give_none(values: dict[str, Any]) -> None:
    found = find({"prompt": "a", "completion": "b"})
    assert found.example(row(**values)) is None


def test_chats_without_an_answer_give_none() -> None:
    found = find({"messages": MESSAGES})
    for messages in ([], None, MESSAGES[:1], [MESSAGES[0], {"role": "assistant", "content": ""}]):
        assert found.example(row(messages=messages)) is None


@pytest.mark.parametrize(
    ("values", "mapping"),
    [
        ({"question": "a", "answer": "b"}, "{prompt: question, completion: answer}"),
        ({"Problem": "a", "Solution": "b", "id": 1}, "{prompt: Problem, completion: Solution}"),
        ({"promt": "a", "completions": "b"}, "{prompt: promt, completion: completions}"),
        ({"data": {"q": "a", "answer": "b"}}, "{prompt: data.q, completion: data.answer}"),
        (
            {"article": "a", "highlights": "b", "id": "c"},
            "{prompt: article, completion: highlights}",
        ),
        (
            {"doc_id": "1", "document": "a", "summary": "b"},
            "{prompt: document, completion: summary}",
        ),
        (
            {"translation": {"en": "a", "fr": "b"}},
            "{prompt: translation.en, completion: translation.fr}",
        ),
        ({"en": "a", "fr": "b", "de": "c"}, "{prompt: COLUMN, completion: COLUMN}"),
        ({"data": {"query": "a", "reply": "b"}}, "{prompt: data.query, completion: data.reply}"),
        ({"text": "a", "code": "b"}, "{prompt: text, completion: code}"),
    ],
)
def test_wrong_columns_name_the_nearest_mapping(values: dict[str, Any], mapping: str) -> None:
    with pytest.raises(DataError) as got:
        find(values)
    message = str(got.value)
    assert message.startswith("rows.jsonl, line 1: the column 'prompt' is missing; found the col")
    assert f"found the columns {', '.join(values)}; expected prompt and completion" in message
    assert message.endswith(f"'dataset.columns={mapping}'")
    if "COLUMN" not in mapping:
        columns = dict(part.split(": ") for part in mapping.strip("{}").split(", "))
        assert find_format([row(**values)], "auto", columns).example(row(**values)) is not None


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (
            {"prompt": "a", "response": "b"},
            "the nearest is dataset.format=prompt-completion "
            "'dataset.columns={prompt: prompt, completion: response}'",
        ),
        (
            {"dialog": "a", "id": 1},
            "say which columns to use: 'dataset.columns={messages: COLUMN}'",
        ),
        ({"talk": MESSAGES}, "the nearest is 'dataset.columns={messages: talk}'"),
    ],
)
def test_missing_messages_are_not_looked_for_in_texts(values: dict[str, Any], advice: str) -> None:
    with pytest.raises(DataError) as got:
        find_format([row(**values)], "chat", {})
    assert str(got.value).endswith(advice)


@pytest.mark.parametrize(
    ("first", "other", "cure"),
    [
        ({"messages": MESSAGES}, {"dialog": MESSAGES}, "rename 'dialog' to 'messages'"),
        ({"messages": MESSAGES}, {"prompt": "a"}, "write a 'messages' into it"),
        (
            {"prompt": "a", "completion": "b"},
            {"prompt": "a", "answer": "b"},
            "rename 'answer' to 'completion'",
        ),
    ],
)
def test_a_row_without_a_column_of_the_others_says_what_it_has_and_what_to_do(
    first: dict[str, Any], other: dict[str, Any], cure: str
) -> None:
    with pytest.raises(DataError) as got:
        find(first).example(row(**other))
    assert f"which other rows have; found the columns {', '.join(other)}; " in str(got.value)
    assert f"expected rows of one form: {cure}, remove the row or put it" in str(got.value)


@pytest.mark.parametrize(
    "text", ["\u2060", "\u200b \u00a0", "\u3164", "\u2800\u2800", "\ufe0f", "\u034f", "\U000e0100"]
)
def test_an_answer_that_shows_nothing_is_an_empty_one(text: str) -> None:
    assert (
        find({"prompt": "a", "completion": "b"}).example(row(prompt="a", completion=text)) is None
    )
    messages = [MESSAGES[0], {"role": "assistant", "content": text}]
    assert find({"messages": MESSAGES}).example(row(messages=messages)) is None
    shown = find({"prompt": "a", "completion": "b"}).example(row(prompt="a", completion=f"{text}x"))
    assert shown is not None


@pytest.mark.parametrize(
    ("values", "name", "columns", "message"),
    [
        ({"q": "a", "a": "b"}, "auto", {"prompt": "qq", "completion": "a"}, "'qq' for prompt is m"),
        ({"prompt": "a"}, "chat", {}, r"the column 'messages' is missing; .* \(format chat\)"),
        ({"instruction": "a"}, "alpaca", {}, "the column 'output' is missing"),
        (
            {"prompt": "a", "completion": "b"},
            "prompt-completion",
            {"messages": "prompt"},
            "names the role 'messages'; the format prompt-completion has the roles prompt, comp",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    values: dict[str, Any], name: str, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        find(values, name, **columns)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, r"holds an object .* write the column as completion\.a"),
        (["a", 1], r"holds a list .* set dataset\.format to chat or sharegpt"),
        (1.5, r"holds a decimal number \(1\.5\); expected text; write it as text"),
        (True, r"holds true or false"),
        ("\ud800", r"half a surrogate pair"),
    ],
)
def test_columns_that_are_not_text_are_refused(value: object, message: str) -> None:
    with pytest.raises(
        DataError, match=r"^rows\.jsonl, line 1: the column 'completion' .*" + message
    ):
        find({"prompt": "a", "completion": "b"}).example(row(prompt="a", completion=value))


def test_a_list_of_texts_is_read_as_lines() -> None:
    values = {"text": "Add.", "test_list": ["assert a", "assert b"], "code": "c"}
    found = find(values, instruction="text", input="test_list", output="code")
    assert found.example(row(**values)) == Pair("Add.\n\nassert a\nassert b", "c")


def test_a_row_without_a_column_that_others_have_is_refused() -> None:
    found = find({"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match="has no column 'completion', which other rows have; found"):
        found.example(row(prompt="a", answer="b"))
    with pytest.raises(DataError, match="has no column 'messages', which other rows have; found"):
        find({"messages": MESSAGES}).example(row(prompt="a"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (TURNS, r"has the keys from, value; expected .* set dataset\.format to sharegpt"),
        (["hi"], r"a message in 'messages' has 'hi'; expected"),
        ([{"role": "robot", "content": "x"}], r"unknown role 'robot' in 'messages'; expected one"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"has a part .* expected parts of text",
        ),
        (MESSAGES[1:], r"the chat starts with the assistant; expected a system or user message"),
        ("not json", r"is text and not a JSON list of messages"),
        ({"role": "user"}, r"expected a list of messages"),
    ],
)
def test_faulty_messages_are_refused(messages: object, message: str) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl, line 1: .*" + message):
        find({"messages": MESSAGES}).example(row(messages=messages))


def test_what_the_first_row_leaves_out_is_read_from_later_ones() -> None:
    first = {"instruction": "Say hi", "output": "hi"}
    later = {"instruction": "Add", "input": "1 and 1", "output": "2", "system": "Be short."}
    form = find_format([Row("r", 1, first)], "auto", {})
    assert form.example(Row("r", 1, first)) == Pair("Say hi", "hi")
    assert form.example(Row("r", 2, later)) == Pair("Add\n\n1 and 1", "2", "Be short.")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    form = find_format([Row("r", 1, {"messages": turns})], "auto", {})
    chat = form.example(Row("r", 2, {"messages": turns, "system": "Be short."}))
    assert isinstance(chat, Chat)
    assert chat.messages[0] == {"role": "system", "content": "Be short."}


def test_two_system_messages_are_refused() -> None:
    turns = [{"role": r, "content": r} for r in ("system", "user", "assistant")]
    row = Row("r.jsonl", 1, {"messages": turns, "system": "s"})
    with pytest.raises(DataError, match="line 1: both 'messages' and the column 'system' give"):
        find_format([row], "auto", {}).example(row)


@pytest.mark.parametrize("answer", [["Paris", "paris"], ["a", "b", "c"]])
def test_several_answers_are_not_joined_to_one(answer: list[str]) -> None:
    one = Row("rows.jsonl", 1, {"prompt": "q", "completion": answer})
    form = find_format([one], "auto", {})
    with pytest.raises(DataError, match=r"holds a list of \d .* expected one text: keep one"):
        form.example(one)
    single = form.example(Row("rows.jsonl", 2, {"prompt": "q", "completion": answer[:1]}))
    assert isinstance(single, Pair)
    assert single.completion == answer[0]


def test_an_answer_that_is_a_json_object_is_text() -> None:
    one = Row("rows.jsonl", 1, {"prompt": "q", "completion": '{"role": "a", "content": "b"}'})
    form = find_format([one], "auto", {})
    assert not form.has_messages
    found = form.example(one)
    assert isinstance(found, Pair)
    assert found.completion == '{"role": "a", "content": "b"}'


def test_an_empty_list_for_a_prompt_is_told_as_what_it_is() -> None:
    one = Row(
        "rows.jsonl", 1, {"prompt": [], "completion": [{"role": "assistant", "content": "b"}]}
    )
    with pytest.raises(DataError, match="holds a list .* a list of messages needs at least one"):
        find_format([one], "auto", {}).example(one)


def test_an_empty_list_is_an_empty_context_and_no_answer() -> None:
    values = {"instruction": "Add", "input": [], "output": "2"}
    assert find(values).example(Row("r", 1, values)) == Pair("Add", "2")
    assert find({"prompt": "a", "completion": "b"}).example(row(prompt="a", completion=[])) is None


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"role": "prompter", "text": "q", "parent_id": None}, r"'role' \('prompter'\) and 'text'"),
        ({"role": "user", "content": "q"}, r"'role' \('user'\) and 'content'"),
        ({"from": "human", "value": "q"}, r"'from' \('human'\) and 'value'"),
    ],
)
def test_rows_of_single_messages_are_refused(values: dict[str, Any], names: str) -> None:
    with pytest.raises(DataError, match=rf"the columns {names} are those of one message of a chat"):
        find(values)
    text = next(name for name in values if name in ("text", "content", "value"))
    assert find(values, "text", text=text).name == "text"
    assert find({"text": "t", "role": "editor"}).name == "text"


def test_the_missing_half_of_a_pair_is_named() -> None:
    with pytest.raises(DataError, match="the column 'completion' is missing; found the columns pr"):
        find({"prompt": "q"})


def test_a_system_prompt_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]
    values = {"system": parts, "messages": MESSAGES}
    chat = find(values).example(Row("r", 1, values))
    assert isinstance(chat, Chat)
    assert chat.messages[0] == {"role": "system", "content": "Be short."}
    values["system"] = [{"type": "image"}]
    with pytest.raises(DataError, match="part of the type 'image'"):
        find(values).example(Row("r", 1, values))


def test_one_column_for_two_roles_is_refused() -> None:
    with pytest.raises(DataError, match="names the column 'q' for prompt and for completion; exp"):
        find({"q": "a", "b": "c"}, prompt="q", completion="q")
