"""Messages as files hold them: JSON text in csv, an object of lists, what Python prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import prepare
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe

TURNS = [
    {"role": "user", "content": "one, two?"},
    {"role": "assistant", "content": 'say "three"'},
    {"role": "user", "content": "and\nthen?"},
    {"role": "assistant", "content": "four"},
]
EXPECTED = (
    '<|user|>one, two?</s><|assistant|>say "three"</s><|user|>and\nthen?</s><|assistant|>four</s>'
)


def read(path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    data = prepare(DatasetRecipe(path=str(path), validation=0), tokenizer, seed=0)
    (row,) = data.train
    learnt = "".join(text for text, is_learnt in data.encoder.pieces(row) if is_learnt)
    assert learnt == 'say "three"</s>four</s>'
    return data.encoder.decode(row.input_ids)


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def struct(turns: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [turn[key] for turn in turns] for key in turns[0]}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("form", [TURNS, struct(TURNS)])
def test_messages_in_csv(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, form: Any, indent: int | None
) -> None:
    path = tmp_path / "r.csv"
    path.write_text("id,messages\n1," + quoted(json.dumps(form, indent=indent)) + "\n")
    assert read(path, tokenizer) == EXPECTED


def test_messages_as_python_prints_them_are_refused_with_the_cure(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "r.csv"
    path.write_text("messages\n" + quoted(str(TURNS)) + "\n")
    with pytest.raises(
        DataError, match=r"line 2: .* as Python prints it, so write the column with"
    ):
        read(path, tokenizer)


def test_messages_as_an_object_of_lists(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"messages": struct(TURNS)}) + "\n")
    assert read(path, tokenizer) == EXPECTED
    sharegpt = {
        "from": ["human", "gpt"] * 2,
        "value": [turn["content"] for turn in TURNS],
        "weight": None,
    }
    path.write_text(json.dumps({"conversations": sharegpt}) + "\n")
    assert read(path, tokenizer) == EXPECTED
    short = {**struct(TURNS), "content": ["a", "b"]}
    path.write_text(json.dumps({"messages": short}) + "\n")
    with pytest.raises(
        DataError, match=r"line 1: .* its lists have different lengths \(role: 4, content: 2\)"
    ):
        read(path, tokenizer)


def test_messages_of_parquet_as_a_struct_of_lists(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"messages": [struct(TURNS)]}), path)
    assert read(path, tokenizer) == EXPECTED
