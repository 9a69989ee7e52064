"""Faulty rows: refused, or left out and counted by reason, up to a share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import prepare
from kpsvd_tune.data.encode.chat_program import TemplateError
from kpsvd_tune.data.read.files import Row
from kpsvd_tune.data.rows.tokenise import Faults, faulty_rows_note
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

GOOD = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(40)]


def read(tokenizer: PreTrainedTokenizerFast, path: Path, **keys: Any) -> Any:
    recipe = DatasetRecipe(path=str(path), **{"validation": 0, "on_bad_row": "drop", **keys})
    return prepare(recipe, tokenizer, seed=0)


def test_the_form_that_most_rows_have_is_taken_for_all(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "r.jsonl"
    other = json.dumps({"messages": [{"role": "user", "content": "q"}]})
    texts = [json.dumps({"text": "plain"})] * 2
    path.write_text("\n".join([other, *texts, *GOOD]))
    data = read(tokenizer, path, max_bad_rows=0.1)
    assert len(data.train) == len(GOOD)
    assert data.report.format == "prompt-completion"
    assert (
        f"{path}: 40 of the first 43 rows have the form prompt-completion, which is taken for all, "
        "as dataset.on_bad_row says; other forms: chat (0), text (2)"
    ) in data.report.warnings
    (note,) = [each for each in data.report.warnings if each.startswith("LEFT OUT")]
    assert "3 of 43 rows" in note
    assert "line 1: the column 'messages' holds messages, and other rows have the form" in note
    path.write_text("\n".join(GOOD))
    assert not read(tokenizer, path).report.warnings


def test_faulty_rows_are_left_out_counted_and_told_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "r.jsonl"
    lines = [
        *GOOD[:1],
        "{oops}",
        *GOOD[1:9],
        '{"prompt": "x", "completion": {"a": 1}}',
        *GOOD[9:],
        '{"prompt": "x"}',
        '{"other": "x"}',
        "{oops again}",
    ]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"line 2: not valid JSON .* dataset\.on_bad_row=drop"):
        read(tokenizer, path, on_bad_row="refuse")
    data = read(tokenizer, path, max_bad_rows=0.2)
    assert [row.row for row in data.train] == [1, *range(3, 11), *range(12, 43)]
    (note,) = [each for each in data.report.warnings if each.startswith("LEFT OUT, as dataset.on")]
    assert note.startswith(
        f"LEFT OUT, as dataset.on_bad_row says: 5 of 45 rows of {path} are faulty: "
        "2 x not valid JSON at column N; "
    )
    assert f"First: {path}, line 2: not valid JSON at column 2 (Expecting property" in note
    assert f" | {path}, line 11: the column 'completion' holds an object" in note
    assert note.count(f"{path}, line ") == 3
    assert data.report.num_dropped == 5
    # A second run finds the rows in the cache, and says the same; so does one by another name.
    again = read(tokenizer, path, max_bad_rows=0.2)
    assert again.report == data.report
    assert again.cache_note.endswith("nothing was tokenised")
    other = tmp_path / "other.jsonl"
    other.write_text(path.read_text())
    found = read(tokenizer, other, max_bad_rows=0.2).report.warnings
    assert note.replace(str(path), str(other)) in found
    with pytest.raises(
        DataError,
        match=r"5 of 45 rows .* That is 11\.1 % of them and dataset\.max_bad_rows is 0\.05 "
        r"\(5 %\); mend the rows, or raise it",
    ):
        read(tokenizer, path)


@pytest.mark.parametrize("first", ["{oops}", '{"other": 1}', '{"prompt": "a"}', "[1]"])
def test_a_faulty_first_row_does_not_decide_the_form(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, first: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join([first, *GOOD]) + "\n")
    assert len(read(tokenizer, path).train) == 40


def test_rows_that_a_template_refuses_are_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "r.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [*turns, {"role": "user", "content": str(n)}, *turns[1:]]}
            for n in range(30)]  # fmt: skip
    rows[7] = {"messages": [{"role": "king", "content": "q"}, *turns]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read(tokenizer, path, template="chat")
    assert len(data.train) == 29
    assert any("1 x unknown role 'king'" in each for each in data.report.warnings)


def test_faulty_rows_of_other_kinds(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    table = tmp_path / "r.csv"
    table.write_text("prompt,completion\n" + "a,b\n" * 30 + "a,b,c\n")
    assert len(read(tokenizer, table).train) == 30
    array = tmp_path / "r.json"
    array.write_text(f"[{', '.join(GOOD)}, 5]")
    assert len(read(tokenizer, array).train) == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"prompt": "a", "completion": "\xff"}\n', "is not UTF-8"),
        ("r.csv", b'prompt,completion\na,b\na,"b\n', "not valid csv"),
        ("r.json", b"[{}, {oops}]", "not valid JSON"),
        ("r.jsonl", b"{oops}\n{oops}\n", "line 1: not valid JSON"),
        ("r.jsonl", b'{"x": 1}\n{"x": 2}\n', "the column 'prompt' is missing|expected prompt"),
    ],
)
def test_faults_of_a_whole_file_are_refused_all_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tokenizer, path, max_bad_rows=1.0)


def test_slices_count_faulty_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join([GOOD[0], "{oops}", *GOOD[1:]]) + "\n")
    data = read(tokenizer, path, split="train[:3]", max_bad_rows=0.5)
    assert [row.row for row in data.train] == [1, 3]


@pytest.mark.parametrize(("number", "kind"), [(10, TemplateError), (2, None)])
def test_a_template_that_refuses_too_many_rows_is_told_as_such(
    number: int, kind: type[DataError] | None
) -> None:
    faults = Faults()
    faults.num_rows = 100
    row = Row("r.jsonl", 3, {})
    for _ in range(number):
        faults.add(row, TemplateError("r.jsonl, line 3: the template says no; expected yes"))
    facts = json.loads(json.dumps(faults.facts()))
    if kind is None:
        note = faulty_rows_note(facts, "s.jsonl", "line", 0.05)
        assert "2 x the template says no. First: s.jsonl, line 3: the template says no" in note
        return
    with pytest.raises(kind, match="10 of 100 rows of s.jsonl are faulty: 10 x the template says"):
        faulty_rows_note(facts, "s.jsonl", "line", 0.05)


def test_faulty_rows_of_a_validation_file_are_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path, held = tmp_path / "r.jsonl", tmp_path / "held.jsonl"
    path.write_text("\n".join(GOOD[:20]) + "\n")
    held.write_text("\n".join([*GOOD[20:], "{oops}"]) + "\n")
    data = read(tokenizer, path, validation=str(held))
    assert len(data.validation) == 20
    assert any(
        each.startswith("validation: LEFT OUT, as dataset.on_bad_row says: 1 of 21 rows")
        for each in data.report.warnings
    )
