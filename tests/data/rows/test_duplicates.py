"""Rows that occur more than once: counted, kept on one side of the split, trained once if asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import PreparedData, prepare
from kpsvd_tune.data.rows.split import split_rows
from kpsvd_tune.data.rows.store import num_shared
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

Read = Callable[..., PreparedData]


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerFast) -> Read:
    def run(seed: int = 0, **keys: Any) -> PreparedData:
        return prepare(DatasetRecipe.model_validate(keys), tokenizer, seed=seed)

    return run


def write(path: Path, numbers: list[int], **more: Any) -> str:
    rows = [{"prompt": f"p{n}", "completion": f"c{n}", **more} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(rows: Any, data: PreparedData) -> list[str]:
    return [data.encoder.decode(row.input_ids) for row in rows]


def note(data: PreparedData, start: str) -> str:
    (found,) = [each for each in data.report.warnings if each.startswith(start)]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_held_out_row_is_never_trained_under_another_number(
    tmp_path: Path, read: Read, seed: int
) -> None:
    path = write(tmp_path / "r.jsonl", [n % 3 for n in range(30)])
    data = read(seed, path=path, validation=6)
    assert len(data.validation) == 6
    assert set(texts(data.train, data)).isdisjoint(texts(data.validation, data))
    assert len(data.train) == 20  # two of three groups of ten; the third was cut for six rows
    assert "4 rows that are held out too" in note(data, "LEFT OUT OF TRAINING")
    assert "18 of 20 rows to train on repeat another (2 distinct; first: " in (
        note(data, "REPEATED ROWS")
    )
    assert note(data, "REPEATED ROWS").endswith("dataset.deduplicate=true trains each once")


def test_deduplicate_trains_each_distinct_row_once(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "r.jsonl", [0, 1, 2, 1, 3, 0])
    other = write(tmp_path / "s.jsonl", [3, 4])
    data = read(path=[path, other], validation=0, deduplicate=True)
    assert [row.row for row in data.train] == [1, 2, 3, 5, 2]
    assert len(set(texts(data.train, data))) == 5
    assert note(data, "3 rows left out") == (
        "3 rows left out that repeat another, as dataset.deduplicate says "
        f"(first: {path}, line 4 is {path}, line 2)"
    )
    twice = read(path=[{"path": path, "weight": 2}], validation=0, deduplicate=True)
    assert len(twice.train) == 8  # weights still repeat rows
    held = read(path=path, validation=1, deduplicate=True)
    assert (len(held.train), len(held.validation)) == (3, 1)
    own = read(path=other, validation=path, deduplicate=True)
    assert len(own.validation) == 4
    assert "2 rows left out" in note(own, "validation: 2 rows left out")


def test_rows_that_differ_only_in_other_columns_are_equal(tmp_path: Path, read: Read) -> None:
    first = write(tmp_path / "a.jsonl", [0, 1], id=1)
    second = write(tmp_path / "b.jsonl", [1, 2], id=2)
    data = read(path=[first, second], validation=0)
    assert note(data, "REPEATED ROWS").startswith("REPEATED ROWS: 1 of 4 rows to train on")


def test_rows_of_a_validation_file_are_left_out_of_training(tmp_path: Path, read: Read) -> None:
    train = write(tmp_path / "train.jsonl", list(range(10)))
    held = write(tmp_path / "held.jsonl", [20, 3, 21, 7])
    data = read(path=train, validation=held)
    assert [row.row - 1 for row in data.train] == [0, 1, 2, 4, 5, 6, 8, 9]
    assert len(data.validation) == 4
    assert note(data, "LEFT OUT OF TRAINING") == (
        "LEFT OUT OF TRAINING: 2 rows that are held out too, since training on them would make "
        f"the validation loss one of known rows (first: {train}, line 4 is {held}, line 2)"
    )
    # A part of the training file that was copied out, as `init` does it, is no mistake.
    part = write(tmp_path / "part.jsonl", [3, 7])
    data = read(path=train, validation=part)
    assert [row.row - 1 for row in data.train] == [0, 1, 2, 4, 5, 6, 8, 9]
    assert note(data, "held out") == (
        "held out: 2 rows of the training file, which are not trained on"
    )
    with pytest.raises(
        DataError,
        match=r"^nothing is left to train on: .*10 rows that are held out too, .* leave "
        r"the validation file out of dataset\.path",
    ):
        read(path=train, validation=train)


def test_parts_of_one_file_may_overlap_and_a_file_may_be_listed_twice(
    tmp_path: Path, read: Read
) -> None:
    path = write(tmp_path / "r.jsonl", list(range(100)))
    sources = [{"path": path, "split": "train[:80]"}, {"path": path, "split": "train[50:]"}]
    data = read(path=sources, validation=0.2)
    assert len(data.validation) == 26
    assert set(texts(data.train, data)).isdisjoint(texts(data.validation, data))
    copied = write(tmp_path / "copy.jsonl", list(range(100)))
    data = read(path=[path, copied], validation=20)
    assert set(texts(data.train, data)).isdisjoint(texts(data.validation, data))
    assert (len(data.train), len(data.validation)) == (180, 20)


def test_a_row_held_out_under_one_template_is_not_trained_under_another(
    tmp_path: Path, read: Read
) -> None:
    path = write(tmp_path / "r.jsonl", list(range(20)))
    sources = [path, {"path": path, "template": "{prompt} -> {completion}"}]
    data = read(path=sources, validation=7)
    trained, held = ({row.row for row in part} for part in (data.train, data.validation))
    assert trained.isdisjoint(held)
    assert len(data.validation) == 7
    assert len(data.train) == 32  # three rows with both their forms, and one more of the fourth
    assert "1 row that is held out too" in note(data, "LEFT OUT OF TRAINING")


def test_rows_of_another_set_that_are_trained_are_counted(tmp_path: Path, read: Read) -> None:
    train = read(path=write(tmp_path / "a.jsonl", [0, 1, 2, 3]), validation=0).train
    test = read(path=write(tmp_path / "b.jsonl", [7, 3, 3, 8]), validation=0).train
    assert num_shared(test, train) == 2
    assert num_shared(train, test) == 1
    assert num_shared((), train) == 0


def test_nothing_is_said_and_nothing_changes_where_all_rows_differ(
    tmp_path: Path, read: Read
) -> None:
    path = write(tmp_path / "r.jsonl", list(range(40)))
    data = read(path=path, validation=0.25)
    assert data.report.warnings == ()
    places, usable = np.arange(40), np.ones(40, dtype=bool)
    trained, held = split_rows(places, 0.25, 0, places, usable)
    assert [row.row - 1 for row in data.train] == trained.tolist()
    assert [row.row - 1 for row in data.validation] == held.tolist()
    assert read(path=path, validation=0.25, deduplicate=True).sha256 == data.sha256


def test_rows_without_tokens_have_no_equal(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "r.jsonl"
    empty = '{"prompt": "x", "completion": ""}\n'
    path.write_text(empty * 5 + '{"prompt": "a", "completion": "b"}\n')
    warnings = read(path=str(path), validation=0).report.warnings
    assert not any("REPEATED" in each or "LEFT OUT" in each for each in warnings)


@given(
    groups=st.lists(st.integers(0, 6), min_size=2, max_size=40),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 3),
)
def test_no_group_is_on_both_sides(groups: list[int], share: float, seed: int) -> None:
    labels, places = np.asarray(groups), np.arange(len(groups))
    usable = np.ones(len(groups), dtype=bool)
    trained, held = split_rows(places, share, seed, labels, usable)
    of_different = split_rows(places, share, seed, places, usable)
    assert not np.isin(labels[trained], labels[held]).any()
    assert len(held) == len(of_different[1])
    rest = np.setdiff1d(np.arange(len(groups)), np.concatenate([trained, held]))
    assert len(set(labels[rest].tolist())) <= 1
    if len(set(groups)) == len(groups):
        assert trained.tolist() == of_different[0].tolist()
