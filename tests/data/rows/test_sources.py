"""Several sources: settings of their own, weights, filters, and what the preflight says of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import PreparedData, prepare, source_names
from kpsvd_tune.data.rows.cache import TokenCache
from kpsvd_tune.data.rows.split import mix
from kpsvd_tune.recipe import DatasetRecipe, SourceRecipe
from kpsvd_tune.report.console import preflight_lines


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    pairs = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(10)]
    chats = [
        {"talk": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f"a{n}"}]}
        for n in range(4)
    ]
    for name, rows in (("a.jsonl", pairs), ("b.jsonl", chats)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


def texts(data: PreparedData) -> list[str]:
    return [data.encoder.decode(row.input_ids) for row in data.train]


def read(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **keys: Any) -> PreparedData:
    recipe = DatasetRecipe.model_validate({"validation": 0, **keys})
    return prepare(recipe, tokenizer, seed=seed)


def test_sources_have_forms_and_templates_of_their_own(
    files: tuple[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    a, b = files
    data = read(tokenizer, path=[{"path": a, "template": "{prompt}>{completion}"}, b])
    assert texts(data)[0] == "p0>c0</s>"
    assert texts(data)[10] == "<|user|>q0</s><|assistant|>a0</s>"
    assert [source.format for source in data.report.sources] == ["prompt-completion", "sharegpt"]
    swapped = {"prompt": "completion", "completion": "prompt"}
    data = read(
        tokenizer, path=[{"path": a, "split": "train[:2]"}, {"path": a, "columns": swapped}]
    )
    assert texts(data)[1:3] == ["Question: p1\nAnswer: c1</s>", "Question: c0\nAnswer: p0</s>"]
    assert source_names(DatasetRecipe.model_validate({"path": [{"path": a}, b]})) == f"{a}, {b}"


def test_weights_decide_how_often_rows_are_seen(
    files: tuple[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    a, b = files
    data = read(tokenizer, path=[{"path": a, "weight": 0.5}, {"path": b, "weight": 2.25}])
    seen = Counter(texts(data))
    pairs = [count for text, count in seen.items() if "Question" in text]
    chats = [count for text, count in seen.items() if "Question" not in text]
    assert pairs == [1] * 5
    assert sorted(chats) == [2, 2, 2, 3]
    first, second = data.report.sources
    assert (first.num_rows, first.num_supervised_tokens) == (5, 5 * 4)  # " c0" and the end
    assert (second.num_rows, second.num_supervised_tokens) == (9, 9 * 3)
    assert data.report.num_rows == 14
    assert data.report.num_supervised_tokens == 5 * 4 + 9 * 3
    lines = preflight_lines(data.report)
    assert lines[2] == f"{a} (prompt-completion, weight 0.5): 5 rows, 20 supervised tokens an epoch"
    assert lines[3] == f"{b} (sharegpt, weight 2.25): 9 rows, 27 supervised tokens an epoch"


def test_the_choice_follows_the_seed_and_nothing_else(
    files: tuple[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    a, _ = files
    paths = [{"path": a, "weight": 0.5}]
    assert read(tokenizer, path=paths).sha256 == read(tokenizer, path=paths).sha256
    assert read(tokenizer, path=paths).sha256 != read(tokenizer, seed=1, path=paths).sha256
    alike = [{"path": a, "weight": 0.5}, {"path": a, "weight": 0.5}]
    chosen = texts(read(tokenizer, path=alike))
    assert chosen[:5] != chosen[5:]  # each source chooses for itself


def test_a_repeated_row_is_never_held_out(
    files: tuple[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    a, _ = files
    data = read(tokenizer, path=[{"path": a, "weight": 3}], validation=4)
    assert (len(data.train), len(data.validation)) == (18, 4)
    assert {row.row for row in data.train}.isdisjoint(row.row for row in data.validation)


def test_a_weight_counts_the_rows_of_all_files_of_a_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(20):
        row = {"prompt": f"p{number}", "completion": f"c{number}"}
        (folder / f"{number:02}.jsonl").write_text(json.dumps(row) + "\n")
    data = read(tokenizer, path=[{"path": str(folder), "weight": 0.1}])
    assert len(data.train) == 2
    assert sum(source.num_rows for source in data.report.sources) == 2
    data = read(tokenizer, path=[{"path": str(folder), "weight": 2.5}])
    assert len(data.train) == 50
    assert set(Counter(texts(data)).values()) == {2, 3}
    assert [source.num_rows for source in data.report.sources] == [
        len(list(group)) for _, group in groupby(texts(data))
    ]


@given(num_rows=st.integers(0, 40), weight=st.floats(0.01, 4))
def test_weights_count_as_documented(num_rows: int, weight: float) -> None:
    places = np.arange(num_rows) + 7
    mixed = mix(places, weight, "key")
    times = Counter(mixed.tolist())
    assert set(times) <= set(places.tolist())
    whole = int(weight)
    assert all(whole <= times[place] <= whole + 1 for place in places.tolist())
    more = round((weight - whole) * num_rows)
    expected = whole * num_rows + more
    assert len(mixed) == (max(1, expected) if num_rows else 0)
    assert mixed.tolist() == sorted(mixed.tolist())
    assert mixed.tolist() == mix(places, weight, "key").tolist()


def test_filters_by_length_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "r.jsonl"
    lengths = [1, 10, 50, 60]
    path.write_text(
        "".join(json.dumps({"text": "abcd"[i] * n}) + "\n" for i, n in enumerate(lengths))
    )
    cut = read(tokenizer, path=str(path), max_length=30)
    assert [len(row.input_ids) for row in cut.train] == [2, 11, 30, 30]
    assert cut.report.num_truncated == 2
    assert cut.report.warnings == (
        "2 rows cut to dataset.max_length (30 tokens), which takes the end token away: raise it "
        "to learn whole completions, or leave such rows out with dataset.too_long: drop "
        f"(first: {path}, line 3)",
    )
    kept = read(tokenizer, path=str(path), max_length=30, too_long="drop", min_length=3)
    assert [row.row for row in kept.train] == [2]
    assert (kept.report.num_truncated, kept.report.num_dropped) == (0, 3)
    assert kept.report.warnings == (
        "2 rows dropped: longer than dataset.max_length (30 tokens), as dataset.too_long says "
        f"(first: {path}, line 3)",
        f"1 row dropped: shorter than dataset.min_length (3 tokens) (first: {path}, line 1)",
    )


def test_a_file_may_be_listed_twice(
    files: tuple[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    a, b = files
    assert len(read(tokenizer, path=[a, a], validation=0).train) == 20
    assert len(read(tokenizer, path=[a, a], validation=b).train) == 20
    data = read(tokenizer, path=[a, b, a], validation=2)
    assert set(texts(data)).isdisjoint(
        data.encoder.decode(row.input_ids) for row in data.validation
    )


def test_a_validation_file_that_is_listed_to_train_on_is_not_trained(
    files: tuple[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    a, b = files
    data = read(tokenizer, path=[b, a], validation=a)
    assert (len(data.train), len(data.validation)) == (4, 10)
    assert any("held out: 10 rows of the training file" in each for each in data.report.warnings)


@pytest.mark.slow
def test_hundreds_of_sources_need_few_open_files_and_no_quadratic_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    looked: list[TokenCache] = []
    monkeypatch.setattr(TokenCache, "prune", lambda self: looked.append(self))
    paths: list[str | SourceRecipe] = []
    for number in range(60):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps({"prompt": f"p{number}", "completion": "c"}) + "\n")
        paths.append(str(file))
    before = len(os.listdir("/proc/self/fd"))
    data = prepare(DatasetRecipe(path=paths, validation=0), tokenizer, seed=0)
    assert len(data.train) == 60
    assert data.report.num_tokens > 0
    # One lock for each store that is in use, and no map.
    assert len(os.listdir("/proc/self/fd")) - before <= 60
    assert len(looked) == 1


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (r"Q: {prompt}\nA: {completion}", "a backslash and 'n', two characters, and not a line"),
        (r"{prompt}\n\n{completion}", "not a line break"),
        (r"{prompt}\nanswer: {completion}", "not a line break"),
        (r"{prompt}\t{completion}", "a backslash and 't', two characters, and not a tab"),
        (r"$\nabla \text \times$ {prompt} \neq {completion}", None),
        ("Q: {prompt}\nA: {completion}", None),
    ],
)
def test_line_breaks_that_were_not_read_as_such_are_told(
    files: tuple[str, str], tokenizer: PreTrainedTokenizerFast, template: str, told: str | None
) -> None:
    data = read(tokenizer, path=files[0], template=template)
    notes = [note for note in data.report.warnings if "backslash" in note]
    assert len(notes) == (told is not None), data.report.warnings
    assert told is None or told in notes[0]
