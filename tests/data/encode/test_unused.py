"""Columns that no role takes: what changes a row's meaning is refused, the rest is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import PreparedData, prepare
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

QUESTION = {"role": "user", "content": "2 + 3?"}
RIGHT = {"role": "assistant", "content": "5"}
WRONG = {"role": "assistant", "content": "6"}
CHAT = {"messages": [QUESTION, RIGHT]}
PAIR = {"prompt": "2 + 3?", "completion": "5"}
TURNS = [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]
GOOD, BAD = ({"from": "gpt", "value": text} for text in "56")

Read = Callable[..., PreparedData]


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Read:
    """Prepare rows; other keywords are keys of the dataset section."""

    def run(*rows: Any, **keys: Any) -> PreparedData:
        path = tmp_path / "r.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = DatasetRecipe.model_validate(
            {"path": str(path), "validation": 0, "template": "chat", **keys}
        )
        return prepare(recipe, tokenizer, seed=0)

    return run


def learnt(data: PreparedData, row: int = 0) -> list[str]:
    return [text for text, is_trained in data.encoder.pieces(data.train[row]) if is_trained]


def before(data: PreparedData) -> str:
    """What stands before the first learnt text of the first row."""
    return data.report.sample[0][0]


def unused(data: PreparedData) -> list[str]:
    return [note for note in data.report.warnings if "not used" in note and "column" in note]


def advised(error: DataError) -> dict[str, Any]:
    """The keys of the dataset section that a message tells to write, word for word."""
    found = re.findall(r"dataset\.(\w+)=(\{.*?\}|\S+)|dataset\.(ignore_columns): (\[.*?\])",
                       str(error))  # fmt: skip
    return {key or other: yaml.safe_load(value or listed) for key, value, other, listed in found}


@pytest.mark.parametrize(
    ("values", "columns"),
    [
        ({"question": "q", "answer": "5", "id": 1}, {"prompt": "question", "completion": "answer"}),
        (
            {
                "task_id": 1,
                "text": "q",
                "code": "5",
                "test_list": ["a", "b"],
                "test_setup_code": "",
            },
            {"instruction": "text", "input": "test_list", "output": "code"},
        ),
        ({"instruction": "q", "input": "i", "output": "5", "text": "### q\n5"}, {}),
        (
            {"instruction": "q", "context": "c", "response": "5", "category": "open_qa"},
            {"instruction": "instruction", "input": "context", "output": "response"},
        ),
        ({"conversations": TURNS, "source": "x", "category": None, "system_prompt": None}, {}),
        ({"id": "a_0", "conversations": TURNS}, {}),
        ({"prompt": "2 + 3?", "prompt_id": "ab", **CHAT}, {}),
        ({**PAIR, "label": "arithmetic", "score": 0.5, "weight": 70}, {}),
        ({**CHAT, "label": None, "images": [], "weight": 1.0, "train": True}, {}),
        ({**PAIR, "is_correct": True}, {}),
        ({"text": "a5", "label": 1, "url": "u"}, {"text": "text"}),
    ],
)
def test_ordinary_rows_are_trained_and_what_is_not_used_is_named(
    read: Read, values: dict[str, Any], columns: dict[str, str]
) -> None:
    data = read(values, columns=columns)
    # Of plain text the first token is the tokenizer's own.
    assert learnt(data) == ["5</s>"]
    used = {"messages", "conversations", "text", "instruction", "input", "output"}
    used = set(columns.values()) or (used - {"text"} | set(PAIR if "completion" in values else ()))
    left = [name for name, value in values.items() if name not in used and value not in (None, [])
            and value != ""]  # fmt: skip
    expected = [f"columns that are not used: {', '.join(left)} (dataset.ignore_columns silences"]
    assert [note.partition(" this)")[0] for note in unused(data)] == (expected if left else [])
    assert not unused(read(values, columns=columns, ignore_columns=left)) or not left


def test_a_part_of_the_example_that_named_columns_leave_out_is_told_of(read: Read) -> None:
    row = {"instruction": "q", "context": "c", "response": "5"}
    data = read(row, columns={"prompt": "instruction", "completion": "response"})
    (note,) = unused(data)
    assert note.startswith("the column 'context' looks like a part of the example and is not used")
    keys = advised(DataError(note))
    assert keys["columns"] == {"instruction": "instruction", "output": "response",
                               "input": "context"}  # fmt: skip
    assert "q\n\nc" in before(read(row, columns=keys["columns"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**CHAT, "label": False}, r"the column 'label' is False, .* \(as rows for KTO do\)"),
        ({**CHAT, "label": True}, r"'label' is True"),
        ({**PAIR, "label": 0}, r"'label' is 0"),
        ({**PAIR, "kto_tag": "true"}, r"'kto_tag' is 'true'"),
        ({**CHAT, "is_correct": False}, r"'is_correct' is False, so the answer seems to be a bad"),
        ({**CHAT, "images": ["a.png"]}, r"'images' holds images, sound or video"),
        ({"conversations": TURNS, "image": "a.png"}, r"'image' holds images"),
        ({**CHAT, "weight": 0.5}, r"'weight' is 0\.5, and rows have no weights of their own"),
        ({**CHAT, "loss_weight": 2}, r"'loss_weight' is 2"),
        ({**CHAT, "train": False}, r"'train' is False, so the row is marked as not to be learnt"),
        ({**CHAT, "loss_mask": [0, 1]}, r"'loss_mask' says token by token"),
        ({**CHAT, "documents": [{"text": "d"}]}, r"'documents' holds documents beside the chat"),
        (
            {**CHAT, "chat_template_kwargs": {"enable_thinking": True}},
            r"'chat_template_kwargs' changes how .* dataset\.template_arguments",
        ),
        ({**PAIR, "context": "In the decimal system."}, r"'context' looks like a part of the pro"),
        ({**PAIR, "history": [["a", "b"]]}, r"'history' looks like a part of the prompt"),
    ],
)
def test_columns_that_change_what_a_row_means_are_refused_also_in_a_later_row(
    read: Read, values: dict[str, Any], message: str
) -> None:
    name = next(name for name in values if name not in (*CHAT, *PAIR, "conversations"))
    with pytest.raises(DataError, match="line 1: the column " + message.replace("the column ", ""))\
            as got:  # fmt: skip
        read(values)
    plain = {key: value for key, value in values.items() if key != name}
    with pytest.raises(DataError, match="line 2: "):
        read(plain, values)
    assert advised(got.value)["ignore_columns"] == [name]
    data = read(values, ignore_columns=[name])
    assert learnt(data) == ["5</s>"]
    assert not unused(data)


@pytest.mark.parametrize("name", ["context", "history"])
def test_the_roles_that_a_refusal_of_a_part_names_can_be_taken(read: Read, name: str) -> None:
    value: Any = [["1 + 1?", "2"]] if name == "history" else "In the decimal system."
    row = {**PAIR, name: value}
    with pytest.raises(DataError, match="looks like a part of the prompt") as got:
        read(row)
    data = read(row, columns=advised(got.value)["columns"])
    if name == "history":
        assert learnt(data) == ["2</s>", "5</s>"]
    else:
        assert before(data) == "<|user|>2 + 3?\n\nIn the decimal system.</s><|assistant|>"


@pytest.mark.parametrize(
    "values",
    [
        {"messages_old": [QUESTION, WRONG], **CHAT},
        {**CHAT, "messages_old": [QUESTION, WRONG]},
        {"conversations": TURNS, "messages": [QUESTION, WRONG]},
        {"prompt": [QUESTION], "completion": [RIGHT], "messages": [QUESTION, WRONG]},
    ],
)
def test_several_columns_with_messages_are_refused_and_one_can_be_chosen(
    read: Read, values: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"line 1: the columns .* all hold messages") as got:
        read(values)
    for name in values:
        assert repr(name) in str(got.value)
    found = advised(got.value)
    ignoring = read(values, ignore_columns=found["ignore_columns"])
    assert learnt(ignoring) == learnt(read(values, columns=found["columns"]))
    kept = next(name for name in values if name in ("messages", "conversations"))
    data = read(values, columns={kept: kept})
    assert learnt(data) == ["6</s>" if WRONG in values[kept] else "5</s>"]
    assert len(unused(data)) == 1


def test_a_second_column_with_messages_in_a_later_row_is_refused(read: Read) -> None:
    with pytest.raises(DataError, match="line 2: the columns 'messages', 'old' all hold messages"):
        read(CHAT, {**CHAT, "old": [QUESTION, WRONG]})


@pytest.mark.parametrize(
    "values",
    [
        {"rejected": [QUESTION, WRONG], "chosen": [QUESTION, RIGHT]},
        {"prompt": "2 + 3?", "rejected": "6", "chosen": "5"},
        {"question": "2 + 3?", "chosen": "5", "rejected": "6"},
        {"prompt": "2 + 3?", "chosen": [QUESTION, RIGHT], "rejected": [QUESTION, WRONG]},
        {"prompt": [QUESTION], "chosen": [RIGHT], "rejected": [WRONG]},
        {"conversations": TURNS[:1], "chosen": GOOD, "rejected": BAD},
        {
            "prompt": "2 + 3?",
            **CHAT,
            "chosen": [QUESTION, RIGHT],
            "rejected": [QUESTION, WRONG],
            "score_chosen": 8.0,
            "score_rejected": 1.0,
        },
        {**PAIR, "rejected": "6"},
        {**CHAT, "rejected_response": "6"},
    ],
)
def test_preferences_are_refused_with_the_way_to_learn_the_chosen_answer(
    read: Read, values: dict[str, Any]
) -> None:
    message = r"line 1: .*'rejected.*rows of preferences, .* \(supervised fine-tuning\)"
    with pytest.raises(DataError, match=message) as got:
        read(values)
    data = read(values, **advised(got.value))
    assert learnt(data) == ["5</s>"]
    assert before(data) == "<|user|>2 + 3?</s><|assistant|>"
    assert not [note for note in data.report.warnings if "looks like" in note]


def test_a_chosen_answer_without_its_question_has_to_be_put_behind_it(read: Read) -> None:
    values = {"prompt": "2 + 3?", "chosen": [RIGHT], "rejected": [WRONG]}
    with pytest.raises(DataError, match=r"write 'prompt' as \[\{'role': 'user', .*then") as got:
        read(values)
    values["prompt"] = [QUESTION]
    assert learnt(read(values, **advised(got.value))) == ["5</s>"]
    with pytest.raises(DataError, match="'chosen' and 'rejected'") as got:
        read({"chosen": "2 + 3? 5", "rejected": "2 + 3? 6"})
    assert advised(got.value)["columns"] == {"text": "chosen"}


def test_a_rejected_answer_in_a_later_row_is_refused(read: Read) -> None:
    with pytest.raises(DataError, match="line 2: the column 'rejected': these are rows of pref"):
        read(PAIR, {**PAIR, "rejected": "6"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (({**PAIR, "messages": None}, {**CHAT, "prompt": None}), "'messages' holds messages, and"),
        (({**CHAT, "prompt": None}, {**PAIR, "messages": None}), "no messages, as others have, b"),
    ],
)
def test_rows_of_another_form_are_refused_rather_than_dropped(
    read: Read, rows: tuple[Any, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"line 2: .*{message}.* make a file of each form"):
        read(*rows)


def test_a_column_to_ignore_that_no_row_has_is_refused(read: Read) -> None:
    with pytest.raises(DataError, match="ignore_columns names 'sorce', and no row of .* has such"):
        read({**PAIR, "source": "x"}, ignore_columns=["sorce"])
    # A later row has it, and the second reading finds the tokenised rows.
    for _ in range(2):
        assert learnt(read(PAIR, {**PAIR, "source": "x"}, ignore_columns=["source"]), 1) == [
            "5</s>"
        ]


def test_a_source_may_ignore_columns_of_its_own(
    read: Read, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for name, rows in (("a", {**PAIR, "label": True}), ("b", PAIR)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(rows) + "\n")
    paths = [{"path": str(tmp_path / "a.jsonl"), "ignore_columns": ["label"]},
             str(tmp_path / "b.jsonl")]  # fmt: skip
    recipe = {"path": paths, "validation": 0, "template": "chat"}
    assert len(prepare(DatasetRecipe.model_validate(recipe), tokenizer, seed=0).train) == 2


def test_a_column_cannot_be_used_and_ignored() -> None:
    with pytest.raises(ValueError, match="leaves out the column 'a', which columns names"):
        DatasetRecipe.model_validate(
            {"path": "r.jsonl", "columns": {"prompt": "a.b"}, "ignore_columns": ["a"]}
        )


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"instruction": "2 + 3?", "input": "ints", "response": "5"}, "2 + 3?\n\nints"),
        ({"Instruction": "2 + 3?", "Context": "ints", "Response": "5", "n": 1}, "2 + 3?\n\nints"),
        ({"question": "2 + 3?", "passage": "ints", "answer": "5"}, "2 + 3?\n\nints"),
        ({"question": "2 + 3?", "options": ["A 4", "B 5"], "answer": "5"}, "2 + 3?\n\nA 4\nB 5"),
        ({"question": "2 + 3?", "context": "", "answer": "5"}, "2 + 3?"),
        ({"input": "2 + 3?", "target": "5"}, "2 + 3?"),
    ],
)
def test_the_advice_on_columns_loses_nothing_and_can_be_followed(
    read: Read, values: dict[str, Any], prompt: str
) -> None:
    with pytest.raises(DataError, match="is missing; found the columns") as got:
        read(values)
    data = read(values, **advised(got.value))
    assert before(data) == f"<|user|>{prompt}</s><|assistant|>"
    assert learnt(data) == ["5</s>"]


def test_the_advice_on_columns_knows_a_system_prompt(read: Read) -> None:
    values = {"question": "2 + 3?", "system_prompt": "Add.", "answer": "5"}
    with pytest.raises(DataError, match="is missing") as got:
        read(values)
    data = read(values, **advised(got.value))
    assert before(data) == "<|system|>Add.</s><|user|>2 + 3?</s><|assistant|>"


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({**CHAT, "id": 1}, {"columns": {"prompt": "question", "completion": "answer"}}),
        ({"msgs": [QUESTION, RIGHT]}, {"format": "alpaca"}),
        ({"data": {"turns": TURNS}}, {}),
        ({"talk": TURNS}, {"format": "chat"}),
        ({"instruction": "2 + 3?", "input": "x", "response": "5"}, {"format": "prompt-completion"}),
    ],
)
def test_the_advice_on_a_file_of_messages_can_be_followed(
    read: Read, values: dict[str, Any], keys: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="is missing") as got:
        read(values, **keys)
    assert learnt(read(values, **{**keys, **advised(got.value)})) == ["5</s>"]


def test_an_empty_first_row_does_not_hide_the_form(read: Read) -> None:
    data = read({"id": 0, "messages": []}, {"id": 1, "messages": None}, {"id": 2, **CHAT})
    assert len(data.train) == 1
    assert any("2 rows dropped: empty" in note for note in data.report.warnings)


def test_context_beside_an_input_has_to_be_joined_with_it(read: Read) -> None:
    row = {"instruction": "2 + 3?", "input": "ints", "context": "base ten", "output": "5"}
    with pytest.raises(DataError, match="'context' looks .*: join it with 'input'; if it means"):
        read(row)


def test_a_system_prompt_that_no_role_takes_is_told_of_with_the_way_to_use_it(read: Read) -> None:
    row = {"conversations": TURNS, "system_prompt": "Add."}
    (note,) = unused(read(row))
    data = read(row, columns=advised(DataError(note))["columns"])
    assert before(data) == "<|system|>Add.</s><|user|>2 + 3?</s><|assistant|>"


NESTED = {"columns": {"prompt": "data.q", "completion": "data.a"}}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"is_correct": False}, r"column 'data\.is_correct' is False"),
        ({"label": 0}, r"column 'data\.label' is 0"),
        ({"weight": 0}, r"column 'data\.weight' is 0"),
        ({"images": ["a.png"]}, r"column 'data\.images' holds images"),
    ],
)
def test_keys_beside_those_that_are_taken_are_looked_at_too(
    read: Read, more: dict[str, Any], message: str
) -> None:
    row = {"data": {"q": "2 + 3?", "a": "5", **more}}
    with pytest.raises(DataError, match=message) as got:
        read(row, **NESTED)
    assert learnt(read(row, **NESTED, **advised(got.value))) == ["5</s>"]


def test_keys_beside_those_that_are_taken_are_named(read: Read) -> None:
    row = {"data": {"q": "2 + 3?", "a": "5", "context": "sums", "id": 7, "more": {"b": 1}}}
    notes = unused(read(row, {"data": None, **PAIR}, row, **NESTED, on_bad_row="drop",
                        max_bad_rows=0.5))  # fmt: skip
    assert any("'data.context' looks like a part" in note for note in notes)
    assert any("not used: data.id, data.more, prompt, completion" in note for note in notes)
    silent = ["data.context", "data.id", "data.more"]
    assert unused(read(row, **NESTED, ignore_columns=silent)) == []


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", "bad"), ("label", "undesirable"), ("kto_tag", "rejected"),
        ("is_correct", 0), ("accepted", "no"), ("is_valid", "0"),
    ],
)  # fmt: skip
def test_other_ways_to_say_that_an_answer_is_bad(read: Read, column: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"line 1: the column '{column}' is {value!r}, "):
        read({**PAIR, column: value})


def test_the_number_of_the_right_choice_is_no_verdict(read: Read) -> None:
    assert learnt(read({**PAIR, "correct": 0, "label": "sums"})) == ["5</s>"]


def test_rows_for_tests_among_rows_to_train_on_are_refused(read: Read) -> None:
    train, test = {**PAIR, "split": "train"}, {**PAIR, "split": "test"}
    with pytest.raises(DataError, match=r"line 3: the column 'split' is 'test' and earlier rows"):
        read(train, train, test)
    assert len(read(test, test).train) == 2
    assert len(read(train, test, ignore_columns=["split"]).train) == 2


def test_tools_in_another_column_are_refused(read: Read) -> None:
    tools = [{"name": "weather"}]
    with pytest.raises(DataError, match=r"column 'available_tools' seems to hold the tools of"):
        read({**CHAT, "available_tools": tools})
    nested = {"columns": {"messages": "data.messages"}}
    row = {"data": {**CHAT, "tools": tools}}
    with pytest.raises(DataError, match=r"column 'data\.tools' seems to hold .*: rename it") as got:
        read(row, **nested)
    assert learnt(read(row, **nested, **advised(got.value))) == ["5</s>"]
    assert learnt(read({**PAIR, "available_tools": tools})) == ["5</s>"]


def test_a_system_prompt_beside_texts_is_never_dropped(read: Read) -> None:
    rows = [PAIR, {**PAIR, "system": "Add."}]
    with pytest.raises(DataError, match=r"line 2: the column 'system' looks like a part") as caught:
        read(*rows)
    advice = advised(caught.value)
    assert before(read(rows[1], columns=advice["columns"])).startswith("<|system|>Add.</s>")
    assert learnt(read(*rows, ignore_columns=advice["ignore_columns"]), 1) == ["5</s>"]


def test_a_system_prompt_beside_a_pair_of_messages_is_used(read: Read) -> None:
    pair = {"prompt": [QUESTION], "completion": [RIGHT]}
    data = read({**pair, "system": "Add."}, pair)
    assert before(data) == "<|system|>Add.</s><|user|>2 + 3?</s><|assistant|>"
    assert not unused(data)


def test_labels_of_steps_that_say_a_step_is_wrong_are_refused(read: Read) -> None:
    row = {"prompt": "2 + 3?", "completion": "6", "labels": [True, False]}
    with pytest.raises(DataError, match=r"'labels' is \[True, False\], so a part of the answer"):
        read(row)
    assert unused(read({**row, "labels": [True, True]}))


@pytest.mark.parametrize("text", ["", "u"])
def test_a_later_row_with_an_answer_is_not_read_as_plain_text(read: Read, text: str) -> None:
    rows = [{"text": "t"}, {"text": text, "summary": "s"}]
    with pytest.raises(DataError, match=r"line 2: the column 'summary' looks like a prompt or an"):
        read(*rows)
    assert len(read(*rows, format="text").train) == 1 + bool(text)
    assert len(read(*rows, ignore_columns=["summary"]).train) == 1 + bool(text)


def test_a_column_without_a_name_is_named_as_such(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "r.csv"
    path.write_text(",prompt,completion\n0,a,b\n")
    data = prepare(DatasetRecipe(path=str(path), validation=0), tokenizer, seed=0)
    assert "not used: '' (a column without a name) (" in unused(data)[0]


@pytest.mark.parametrize(
    ("column", "kept", "refused"),
    [
        ("status", "submitted", "discarded"),
        ("deleted", False, True),
        ("is_test", 0, 1),
    ],
)
def test_rows_that_were_set_aside_are_refused(
    read: Read, column: str, kept: Any, refused: Any
) -> None:
    rows = {**PAIR, column: kept}, {**PAIR, column: refused}
    with pytest.raises(DataError, match=rf"line 2: the column '{column}' is {refused!r}, so the"):
        read(*rows)
    assert len(read(*rows, ignore_columns=[column]).train) == 2


def test_a_set_of_held_out_rows_among_others_is_refused(read: Read) -> None:
    with pytest.raises(DataError, match="the column 'set' is 'dev' and earlier rows"):
        read({**PAIR, "set": "train"}, {**PAIR, "set": "dev"})


@pytest.mark.parametrize("form", ["chat", "sharegpt", "lists", "text"])
def test_an_answer_beside_a_chat_that_ends_with_a_question_is_refused(
    read: Read, form: str
) -> None:
    talk = [*CHAT["messages"], {"role": "user", "content": "And 2 + 2?"}]
    rows: dict[str, dict[str, Any]] = {
        "chat": {"messages": talk},
        "sharegpt": {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
                for m in talk
            ]
        },
        "lists": {"messages": {key: [m[key] for m in talk] for key in ("role", "content")}},
        "text": {"messages": json.dumps(talk)},
    }
    row = {**rows[form], "response": "4"}
    with pytest.raises(DataError, match=r"'response' seems to hold the answer to the chat in"):
        read(row)
    assert learnt(read(row, ignore_columns=["response"])) == learnt(read(rows[form]))
    # Where the chat has its answer, or the recipe names its column, a note is enough.
    assert "response" in unused(read({**CHAT, "response": "4"}))[0]
    with pytest.raises(DataError, match="line 2: .*'messages', which ends without an answer"):
        read({**CHAT, "response": "4"}, {"messages": talk, "response": "4"})


def test_columns_of_token_ids_and_roles_are_not_advised(read: Read) -> None:
    with pytest.raises(DataError, match=r"\{prompt: COLUMN, completion: COLUMN\}"):
        read({"input_ids": [1, 2], "labels": [-100, 2]})
    tree = {"prompt": {"text": "q", "role": "prompter", "replies": []}}
    with pytest.raises(DataError, match=r"the column 'completion' is missing") as got:
        read(tree)
    assert "prompt.role" not in str(got.value)
