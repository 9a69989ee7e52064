"""The file of completions: append, survive a kill, refuse what cannot be scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.completions import (
    Completion,
    append_completion,
    read_completions,
    repair_completions,
)

FIRST = Completion(0, "2 + 2 =", " 4", "4")
SECOND = Completion("b", "3 + 3 =", " 6\n\u2028 \u00e9", {"test_list": ["assert True"]})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "completions.jsonl"
    append_completion(path, FIRST)
    append_completion(path, SECOND)
    return path


def test_rows_come_back_as_they_were_written(file: Path):
    assert read_completions(file) == [FIRST, SECOND]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [set(row) for row in rows] == [{"id", "prompt", "completion", "gold"}] * 2


@pytest.mark.slow
@given(st.text(st.characters(exclude_categories=())))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.mktemp("any") / "completions.jsonl"
    append_completion(path, Completion(1, text, text, text))
    assert read_completions(path) == [Completion(1, text, text, text)]


def test_every_torn_end_loses_one_row_at_most(file: Path):
    whole = file.read_bytes()
    start = whole.index(b"\n") + 1
    for length in range(start, len(whole)):
        file.write_bytes(whole[:length])
        is_complete = length == len(whole) - 1  # only the line end is missing
        expected = [FIRST, SECOND] if is_complete else [FIRST]
        assert read_completions(file) == expected
        repair_completions(file)
        append_completion(file, Completion(9, "", "", ""))
        assert read_completions(file) == [*expected, Completion(9, "", "", "")]


def test_repair_leaves_a_whole_or_missing_file_alone(file: Path, tmp_path: Path):
    before = file.read_bytes()
    repair_completions(file)
    assert file.read_bytes() == before
    repair_completions(tmp_path / "missing.jsonl")
    assert not (tmp_path / "missing.jsonl").exists()


def test_samples_are_counted_where_they_are_not_numbered(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": i, "prompt": "", "completion": "", "gold": ""} for i in (1, 2, 1)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [each.key for each in read_completions(path)] == [(1, 0), (2, 0), (1, 1)]


def test_samples_written_out_of_order_keep_their_numbers(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    for sample in (2, 0, 1):
        append_completion(path, Completion(1, "", str(sample), "", sample))
    assert [(each.sample, each.completion) for each in read_completions(path)] == [
        (2, "2"),
        (0, "0"),
        (1, "1"),
    ]


def test_rows_without_an_id_are_numbered(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"completion": "a", "gold": "b"}\n\n{"completion": "a", "gold": "b"}\n')
    assert len({each.id for each in read_completions(path)}) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json\n{}\n", "line 1 is no JSON object"),
        ("[1]\n{}\n", "line 1 is no JSON object"),
        ('{"gold": "1"}\n', "line 1 has no completion. Expected a row"),
        ('{"completion": "1"}\n', "line 1 has no gold"),
        ('{"a": 1}\n', "has no completion and no gold.*got the keys a"),
        ('{"completion": 1, "gold": "1"}\n', "line 1 has a completion that is no text"),
        ('{"id": [1], "completion": "", "gold": ""}\n', "id must be a number or a text, got"),
        (
            '{"id": 1, "sample": 2, "completion": "", "gold": ""}\n' * 2,
            "line 2 is another row with id 1 and sample 2. Expected each once",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_by_line(tmp_path: Path, content: str, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_completions(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"cannot read completions from .*gone\.jsonl: No such file"
    ):
        read_completions(tmp_path / "gone.jsonl")
