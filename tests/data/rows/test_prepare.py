"""From the recipe's dataset section to rows: twelve files of real life, counts, refusals."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import IGNORED, PreparedData, TokenizedRow, prepare, read_examples
from kpsvd_tune.data.encode.encoder import Mark
from kpsvd_tune.data.rows.preflight import check_end_tokens, check_known_tokens, pad_token_id
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import Columns, DatasetRecipe

QUESTIONS: Columns = {"prompt": "question", "completion": "answer"}
MESSAGES = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
TURNS = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
    for m in MESSAGES
]
PAIR = {"prompt": "1+1?", "completion": "2"}

Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepare_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Prepare:
    """Write a file and prepare it; keywords are keys of the dataset section."""

    def run(name: str, content: str | bytes | list[Any], **keys: Any) -> PreparedData:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return prepare(
            DatasetRecipe(path=str(path), **{"validation": 0, **keys}), tokenizer, seed=0
        )

    return run


def learnt(data: PreparedData) -> list[str]:
    """What each row teaches, put together from its trained stretches."""
    return [
        "|".join(text for text, is_trained in data.encoder.pieces(row) if is_trained)
        for row in data.train
    ]


# Name, content, dataset keys, and what each row teaches.
TRAINED: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "prompt and completion": ("r.jsonl", [PAIR], {}, [" 2</s>"]),
    "alpaca": (
        "r.json",
        json.dumps([{"instruction": "Add", "input": "1 and 1", "output": "2"}]),
        {},
        [" 2</s>"],
    ),
    "chat": ("r.jsonl", [{"messages": MESSAGES}], {}, ["a1</s>|a2</s>"]),
    "sharegpt": ("r.jsonl", [{"conversations": TURNS}], {}, ["a1</s>|a2</s>"]),
    "empty rows": (
        "r.jsonl",
        "\n" + json.dumps(PAIR) + '\n\n{}\n{"prompt": "x", "completion": ""}\n',
        {},
        [" 2</s>"],
    ),
    "byte order mark": ("r.csv", b"\xef\xbb\xbfprompt,completion\na,b\n", {}, [" b</s>"]),
    "crlf": ("r.jsonl", (json.dumps(PAIR) + "\r\n") * 2, {}, [" 2</s>"] * 2),
    "unicode": (
        "r.jsonl",
        '{"prompt": "日本", "completion": "naïve 👩‍🚀\u2028Ω"}',
        {},
        [" naïve 👩‍🚀\u2028Ω</s>"],
    ),
    "a row of 10,000 tokens": (
        "r.jsonl",
        [{"prompt": "p", "completion": "x" * 10_000}, PAIR],
        {"max_length": 40},
        [" " + "x" * 20, " 2</s>"],
    ),
    "csv with quotes": (
        "r.csv",
        'prompt,completion\r\n"say ""hi"", please","line one\r\nline ""two"""\r\n',
        {},
        [' line one\r\nline "two"</s>'],
    ),
    "nested json": (
        "r.jsonl",
        [{"data": {"q": "1+1?", "a": "2"}}],
        {"columns": {"prompt": "data.q", "completion": "data.a"}},
        [" 2</s>"],
    ),
    "plain text": (
        "r.jsonl",
        [{"text": "once upon"}],
        {"columns": {"completion": "text"}, "template": "{completion}"},
        ["nce upon</s>"],  # nothing predicts the first token
    ),
}
REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "wrong columns": (
        "r.jsonl",
        [{"question": "1+1?", "answer": "2"}],
        {},
        r"r\.jsonl, line 1: the column 'prompt' is missing; found the columns question, answer; "
        r"expected prompt and completion .* 'dataset\.columns={prompt: question, completion: answ",
    ),
    "duplicate keys": (
        "r.jsonl",
        json.dumps(PAIR) + '\n{"prompt": "a", "prompt": "b", "completion": "c"}\n',
        {},
        r"r\.jsonl, line 2: the key 'prompt' occurs twice in one object: keep one of the two",
    ),
    "nested json without a path": (
        "r.jsonl",
        [{"data": {"question": "1+1?", "answer": "2"}}],
        {},
        r"dataset\.columns={prompt: data\.question, completion: data\.answer}",
    ),
    "only empty rows": (
        "r.jsonl",
        '{"prompt": "a", "completion": ""}\n{"prompt": "b", "completion": null}\n',
        {},
        r"nothing can be trained in any of the 2 training rows: 2 rows dropped: empty, or without "
        r"a completion \(first: .*r\.jsonl, line 1\)",
    ),
    "only prompts that fill the length": (
        "r.jsonl",
        [{"prompt": "x" * 50, "completion": "a"}],
        {"max_length": 20},
        r"1 row dropped: the prompt alone fills dataset\.max_length \(20 tokens\)",
    ),
    "csv with an open quote": (
        "r.csv",
        'prompt,completion\na,b\n"c,d\n',
        {},
        r"r\.csv, line 3: not valid csv",
    ),
}


@pytest.mark.parametrize("case", TRAINED.values(), ids=TRAINED)
def test_files_of_real_life_train(case: Any, prepare_file: Prepare) -> None:
    name, content, keys, expected = case
    assert learnt(prepare_file(name, content, **keys)) == expected


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_files_of_real_life_are_refused_with_a_cure(case: Any, prepare_file: Prepare) -> None:
    name, content, keys, message = case
    with pytest.raises(DataError, match=message):
        prepare_file(name, content, **keys)


def test_report_counts_what_is_there(prepare_file: Prepare) -> None:
    rows = [
        PAIR,
        {"prompt": "x", "completion": "y" * 100},
        {"prompt": "z" * 100, "completion": "a"},
        {"prompt": "a", "completion": ""},
    ]
    data = prepare_file("r.jsonl", rows, max_length=50)
    report = data.report
    first = len("Question: 1+1?\nAnswer: 2") + 1
    assert report.num_rows == 2
    assert report.num_validation_rows == 0
    assert report.num_tokens == first + 50
    assert report.num_supervised_tokens == len(" 2") + 1 + 50 - len("Question: x\nAnswer:")
    assert report.num_truncated == 1
    assert report.num_dropped == 2
    assert report.max_tokens == 50
    assert report.format == "prompt-completion"
    assert report.sample == (("Question: 1+1?\nAnswer:", False), (" 2</s>", True))
    assert [row.row for row in data.train] == [1, 2]
    assert [warning.split(" (")[0] for warning in report.warnings] == [
        "1 row dropped: empty, or without a completion",
        "1 row dropped: the prompt alone fills dataset.max_length",
        "1 row cut to dataset.max_length",
    ]


def test_question_and_answer_columns_with_the_chat_template(
    rows_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = DatasetRecipe(path=str(rows_file), columns=QUESTIONS, template="chat", validation=2)
    calls: list[tuple[int, int]] = []
    data = prepare(
        recipe, tokenizer, seed=0, progress=lambda done, total: calls.append((done, total))
    )
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert calls == [(8, 0), (8, 8)]  # how many there are is known at the end
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for row, text in zip(data.train, learnt(data), strict=True):
        source = rows[row.row - 1]
        assert text == source["answer"] + "</s>"
        prompt = data.encoder.encode_prompt(source["question"])
        assert list(row.input_ids[: len(prompt)]) == prompt
    assert {row.row for row in data.train}.isdisjoint(row.row for row in data.validation)


def test_validation_from_a_file(prepare_file: Prepare, tmp_path: Path) -> None:
    held_out = tmp_path / "held.csv"
    held_out.write_text("prompt,completion\na,b\n")
    data = prepare_file("r.jsonl", [PAIR, PAIR], validation=str(held_out), split="train[:1]")
    assert (data.report.num_rows, data.report.num_validation_rows) == (1, 1)
    assert [row.row for row in data.validation] == [2]  # the line in its own file


def test_hash_follows_what_is_trained_and_nothing_else(prepare_file: Prepare) -> None:
    rows = [{"prompt": str(n), "completion": str(n + 1)} for n in range(6)]
    base = prepare_file("a.jsonl", rows, validation=2).sha256
    assert prepare_file("b.json", json.dumps(rows), validation=2).sha256 == base
    assert prepare_file("a.jsonl", rows, validation=2, max_length=400).sha256 == base
    others = [
        prepare_file("a.jsonl", rows[::-1], validation=2).sha256,
        prepare_file("a.jsonl", [*rows[:5], {**rows[5], "completion": "7"}], validation=2).sha256,
        prepare_file("a.jsonl", rows, validation=3).sha256,
        prepare_file("a.jsonl", rows, validation=2, template="{prompt}:{completion}").sha256,
        prepare_file("a.jsonl", rows, validation=2, max_length=20).sha256,
    ]
    assert len({base, *others}) == 6


def test_chat_rows_take_the_chat_template_and_say_so_when_another_is_named(
    prepare_file: Prepare,
) -> None:
    rows = [{"messages": MESSAGES}]
    assert prepare_file("r.jsonl", rows).report.warnings == ()
    named = prepare_file("r.jsonl", rows, template="{prompt} {completion}").report.warnings
    assert named == (
        "dataset.template is not used: chat rows take the tokenizer's own template; set it to chat",
    )


def test_a_chat_fault_names_its_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}"
        + tokenizer.chat_template
    )
    path = tmp_path / "r.jsonl"
    path.write_text(
        json.dumps({"messages": MESSAGES[:3]}) + "\n" + json.dumps({"messages": MESSAGES}) + "\n"
    )
    with pytest.raises(DataError, match=r"r\.jsonl, line 2: .* refuses these messages: too many"):
        prepare(DatasetRecipe(path=str(path), validation=0), strict, seed=0)


def test_system_column_needs_its_place(prepare_file: Prepare) -> None:
    rows = [{**PAIR, "rules": "be brief"}]
    columns = {"prompt": "prompt", "completion": "completion", "system": "rules"}
    data = prepare_file(
        "r.jsonl", rows, columns=columns, template="{system}\n{prompt}={completion}"
    )
    assert data.report.sample[0] == ("be brief\n1+1?=", False)
    unused = prepare_file("r.jsonl", rows, columns=columns)
    assert "the column 'rules' is not used" in unused.report.warnings[0]
    with pytest.raises(DataError, match=r"template has {system} and no column gives it"):
        prepare_file("r.jsonl", rows, template="{system}\n{prompt}={completion}")


def test_special_tokens_in_rows_are_warned_of(prepare_file: Prepare) -> None:
    warnings = prepare_file(
        "r.jsonl", [PAIR, {"prompt": "a</s>", "completion": "b"}]
    ).report.warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("1 row with the text of a special token in them, which is read")
    assert warnings[0].endswith("r.jsonl, line 2)")


def test_pad_equal_to_end_token_still_trains_the_end(
    rows_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    data = prepare(DatasetRecipe(path=str(rows_file), columns=QUESTIONS), same, seed=0)
    assert all(row.labels[-1] == same.eos_token_id for row in data.train)
    assert data.report.warnings[0].startswith("pad and end token are the same ('</s>')")
    none = copy.deepcopy(tokenizer)
    none.pad_token = None
    data = prepare(DatasetRecipe(path=str(rows_file), columns=QUESTIONS), none, seed=0)
    assert data.report.warnings[0].startswith("the tokenizer has no pad token")
    assert pad_token_id(none) == none.eos_token_id
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id


def test_a_row_longer_than_the_tokenizer_says_is_warned_of(prepare_file: Prepare) -> None:
    long = {"prompt": "x", "completion": "y" * 600}
    assert prepare_file("r.jsonl", [PAIR], max_length=2000).report.warnings == ()
    assert prepare_file("r.jsonl", [long], max_length=2000).report.warnings == (
        "the longest row has 621 tokens and the tokenizer says that its model takes 512: lower "
        "dataset.max_length",
    )


def test_masked_end_token_is_refused() -> None:
    whole = TokenizedRow((5, 6, 2), (IGNORED, 6, 2), 1)
    masked = TokenizedRow((5, 6, 2), (IGNORED, 6, IGNORED), 7)
    cut = TokenizedRow((5, 6, 2), (IGNORED, 6, IGNORED), 7, Mark.CUT)
    check_end_tokens([whole], [2])
    check_end_tokens([whole, cut], [2])  # a cut row has none, rightly
    with pytest.raises(DataError, match=r"row 7: the end token is not trained \(the last .* is 6"):
        check_end_tokens([whole, masked], [2])


def test_token_without_an_embedding_is_refused() -> None:
    rows = [TokenizedRow((5, 32), (IGNORED, 32), 3)]
    check_known_tokens(rows, 33)
    with pytest.raises(DataError, match="row 3: token id 32 has no embedding, the model has 32"):
        check_known_tokens(rows, 32)


def test_examples_for_evaluation_are_read_alike(rows_file: Path) -> None:
    found = read_examples(str(rows_file), columns={"prompt": "question", "completion": "answer"})
    examples = [example for _, example in found]
    assert len(examples) == 8
    assert examples[0] is not None
    assert examples[0].prompt.startswith("Tom has 1 nuts")  # type: ignore[union-attr]


def test_a_late_system_prompt_without_a_place_is_told_of(prepare_file: Prepare) -> None:
    rows = [{"instruction": f"i{k}", "output": "o"} for k in range(501)]
    assert not prepare_file("r.jsonl", rows).report.warnings
    rows.append({"instruction": "i", "output": "o", "system": "short"})
    notes = prepare_file("r.jsonl", rows).report.warnings
    assert "the column 'system' is not used: dataset.template has no {system}" in notes


@pytest.mark.parametrize(("validation", "number"), [(3, 3), (0.5, 2)])
def test_rows_that_cannot_be_learnt_take_no_place_of_held_out_ones(
    prepare_file: Prepare, validation: float, number: int
) -> None:
    good = [{"prompt": f"q{k}", "completion": f"a{k}"} for k in range(4)]
    empty = [{"prompt": f"q{k}", "completion": ""} for k in range(4, 10)]
    long = {"prompt": "x" * 60, "completion": "a"}
    keys = {"validation": validation, "max_length": 50, "too_long": "drop"}
    data = prepare_file("r.jsonl", [*empty, *good, long], **keys)
    assert (len(data.train), len(data.validation)) == (4 - number, number)
    assert data.report.num_dropped == 7
    with pytest.raises(DataError, match="holds out 4 rows and the dataset has 4 that can be learn"):
        prepare_file("r.jsonl", [*empty, *good, long], **{**keys, "validation": 4})


def test_a_prompt_without_a_place_is_told_of(prepare_file: Prepare) -> None:
    data = prepare_file("r.jsonl", [PAIR], template="Answer: {completion}")
    assert data.report.warnings == (
        "the column 'prompt' is not used: dataset.template has no {prompt}",
    )
