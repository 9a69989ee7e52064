"""Folders, patterns, cards, saved tables, compressed files: which rows are read and which not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kpsvd_tune.data import PreparedData, prepare
from kpsvd_tune.data.read.sources import load_rows
from kpsvd_tune.errors import DataError
from kpsvd_tune.recipe import DatasetRecipe
from kpsvd_tune.report.console import preflight_lines


def write(path: Path, *names: str) -> Path:
    """A file of a row for each name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": n, "completion": "c"}) + "\n" for n in names))
    return path


def read(path: Any, split: str = "train", **keys: Any) -> list[str]:
    return [str(row.values["prompt"]) for row in load_rows(str(path), split=split, **keys).rows]


def test_a_folder_is_read_by_extension_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "b")
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "LICENSE.txt").write_text("a text that nobody wants to learn\n")
    (tmp_path / "README.md").write_text("# Rows\n")
    (tmp_path / "metadata.json").write_text('{"made": "today"}')
    (tmp_path / ".hidden.jsonl").write_text("{oops}")
    (tmp_path / ".git").mkdir()
    loaded = load_rows(str(tmp_path))
    assert [row.values["prompt"] for row in loaded.rows] == ["a", "b"]
    assert loaded.rows[1].where == f"{tmp_path / 'b.jsonl'}, line 1"
    assert loaded.notes == (
        f"{tmp_path}: read as train: a.jsonl, b.jsonl; left out: .git/, .hidden.jsonl, "
        "LICENSE.txt, README.md, metadata.json (no rows)",
    )


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train.jsonl", "test.jsonl"], ["train"], ["test"]),
        (["train.jsonl", "dev.jsonl", "eval_set.jsonl"], ["train"], ["eval_set"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "t/Test.jsonl"],
         ["train-00000-of-00002", "train-00001-of-00002"], ["Test"]),
        (["train/a.jsonl", "test/a.jsonl"], ["a"], ["a"]),
        (["data.jsonl", "my_test.jsonl"], ["data"], ["my_test"]),
        (["x.train.jsonl", "x.test.jsonl", "other.jsonl"], ["x.train"], ["x.test"]),
        (["train.jsonl.gz", "test.jsonl"], ["train.jsonl"], ["test"]),
    ],
)  # fmt: skip
def test_files_of_another_split_are_never_trained(
    tmp_path: Path, names: list[str], train: list[str], test: list[str]
) -> None:
    for name in names:
        path = write(tmp_path / name, Path(name).stem)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path) == train
    assert read(tmp_path, "test") == test
    (note,) = load_rows(str(tmp_path)).notes
    assert "(split test)" in note


def test_splits_that_are_not_there_or_unclear_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "dev.jsonl", "v")
    write(tmp_path / "a" / "test.jsonl", "t")
    with pytest.raises(DataError, match=r"has no files of that split; it has validation \(dev\.js"):
        read(tmp_path / "a")
    assert read(tmp_path / "a", "val") == ["v"]
    assert read(tmp_path / "a", "validation+test[:1]") == ["v", "t"]
    write(tmp_path / "b" / "train_eval.jsonl", "x")
    with pytest.raises(DataError, match=r"train_eval\.jsonl tells the splits test and train; exp"):
        read(tmp_path / "b")
    write(tmp_path / "c" / "test" / "train.jsonl", "x")
    with pytest.raises(DataError, match=r"tells the splits test and train"):
        read(tmp_path / "c")


def test_mixtures_and_folders_without_rows_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m" / "a.jsonl", "a")
    (tmp_path / "m" / "b.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(
        DataError, match=r"files of several kinds \(a\.jsonl and b\.csv\), .*\*\.js"
    ):
        read(tmp_path / "m")
    assert read(tmp_path / "m" / "*.csv") == ["a"]
    with pytest.raises(DataError, match=r"matches files of several kinds .*\*\.jsonl"):
        read(tmp_path / "m" / "*")
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no file of rows \(it has notes\.txt\); expected"):
        read(tmp_path / "n")
    with pytest.raises(DataError, match=r"no file of rows matches this pattern .*matches nothing"):
        read(tmp_path / "*.jsonl")


def test_patterns(tmp_path: Path) -> None:
    for name in ("data/x1.jsonl", "data/x2.jsonl", "data/deep/x3.jsonl", "data/test.jsonl"):
        write(tmp_path / name, Path(name).stem)
    assert read(tmp_path / "data" / "x*.jsonl") == ["x1", "x2"]
    assert read(tmp_path / "data" / "**" / "*.jsonl") == ["x3", "x1", "x2"]
    assert read(tmp_path / "data" / "te*.jsonl") == ["test"]  # picked by name
    odd = write(tmp_path / "odd[1].jsonl", "odd")
    assert read(odd) == ["odd"]


def test_stretches_count_through_all_files_of_a_split(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *"abc")
    write(tmp_path / "b.jsonl", *"defg")
    assert read(tmp_path, "train[2:5]") == list("cde")
    assert read(tmp_path, "train[-2:]") == list("fg")
    assert read(tmp_path, "train[50%:]") == list("efg")
    assert load_rows(str(tmp_path), split="train[4:5]").rows[0].number == 2
    with pytest.raises(DataError, match=r"keeps none of the 7 rows of"):
        read(tmp_path, "train[7:]")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[1", r"expected a name such as train, a stretch of its rows such as train\[:100\]"),
        ("train[:10%", "expected a name"),
        ("train[a:b]", "expected a name"),
        ("train[5:50%]", "mixes rows and per cent"),
        ("train[:150%]", "expected from -100% to 100%"),
        ("train[:5](closest)", "says how per cent are rounded, and there are none"),
        ("train+test", "is one file without splits, and .*, which would read its rows 2 times"),
    ],
)
def test_a_split_that_is_none_says_what_is_possible(
    tmp_path: Path, split: str, message: str
) -> None:
    path = write(tmp_path / "r.jsonl", "a")
    with pytest.raises(DataError, match=message):
        read(path, split)


@pytest.mark.parametrize("num_rows", [3, 10, 101, 250])
@pytest.mark.parametrize(
    "split",
    [
        "train[:50%]", "train[33%:66%]", "train[-15%:]", "train[:-1%]", "train[5:1]",
        "train[-5:-2]", "train[1_0:2_0]", "train[:1%]+train[-1:]", "train[:999]",
        "train[10%:20%](pct1_dropremainder)",
    ],
)  # fmt: skip
def test_stretches_are_those_of_the_datasets_library(
    tmp_path: Path, num_rows: int, split: str
) -> None:
    from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]
    from datasets.arrow_reader import ReadInstruction  # type: ignore[import-untyped]

    names = [str(n) for n in range(num_rows)]
    # The library refuses this rounding for fewer rows than a hundred; nothing is kept of them here.
    stretches = (
        [names[each.from_ : each.to]
         for each in ReadInstruction.from_spec(split).to_absolute({"train": num_rows})]
        if num_rows > 100 or "dropremainder" not in split
        else [[]]
    )  # fmt: skip
    path = write(tmp_path / "r.jsonl", *names)
    saved = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_dict({"prompt": names})}).save_to_disk(saved)
    for source in (path, saved):
        if all(stretches):
            assert read(source, split) == [name for stretch in stretches for name in stretch]
        else:
            with pytest.raises(DataError, match=f"keeps none of the {num_rows} rows"):
                read(source, split)


def test_tables_of_save_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"]})
    one.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one", "train[1:]") == ["b"]
    assert load_rows(str(tmp_path / "one"), split="test").notes == (
        f"{tmp_path / 'one'}: holds one table without splits: the split 'test' has no effect",
    )
    DatasetDict({"train": one.select([0]), "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two") == ["a"]
    assert read(tmp_path / "two", "train+test") == ["a", "b"]
    with pytest.raises(DataError, match=r"split is 'dev' and .*two has the splits train, test"):
        read(tmp_path / "two", "dev")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"oops")
    with pytest.raises(DataError, match="looks like a folder of save_to_disk and cannot be loaded"):
        read(tmp_path / "one")


CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: first.jsonl}
  - {split: test, path: ["second*.jsonl"]}
- config_name: other
  data_files: third.jsonl
- config_name: odd
  data_files: third.jsonl
  sep: "|"
---
# A set
"""


def test_a_copy_of_a_hub_set_is_read_as_its_card_says(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    for name in ("first", "second", "second_b", "third"):
        write(tmp_path / f"{name}.jsonl", name)
    assert read(tmp_path) == ["first"]
    assert read(tmp_path, "test") == ["second", "second_b"]
    assert read(tmp_path, name=["other", "main"]) == ["third", "first"]
    write(tmp_path / "first.jsonl", "changed")
    assert read(tmp_path) == ["changed"]
    with pytest.raises(
        DataError, match=r"dataset\.name is 'x' and the README\.md of .* main, other"
    ):
        read(tmp_path, name="x")
    with pytest.raises(DataError, match="sets sep, which changes how the files are read"):
        read(tmp_path, name="odd")
    (tmp_path / "README.md").write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(DataError, match=r"configurations main, other, odd; expected dataset\.name"):
        read(tmp_path)


def test_compressed_files(tmp_path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]

    text = write(tmp_path / "r.jsonl", *map(str, range(3000))).read_bytes()
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(text))
    with pa.CompressedOutputStream(pa.OSFile(str(tmp_path / "r.jsonl.zst"), "wb"), "zstd") as file:
        file.write(text)
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(b"prompt,completion\na,b\n"))
    (tmp_path / "r.json.gz").write_bytes(gzip.compress(b'[{"prompt": "a"}]'))
    expected = read(tmp_path / "r.jsonl")
    for ending in ("gz", "zst"):
        path = tmp_path / f"r.jsonl.{ending}"
        assert read(path) == expected
        assert load_rows(str(path), split="train[9:10]").rows[0].where == f"{path}, line 10"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        with pytest.raises(DataError, match=rf"r\.jsonl\.{ending}: cannot be unpacked .*whole \."):
            read(path)
        path.write_bytes(text)
        with pytest.raises(
            DataError, match=r"cannot be unpacked .* rename it to r\.jsonl if it is"
        ):
            read(path)
        wrong = tmp_path / f"wrong_{ending}.jsonl"
        wrong.write_bytes(whole)
        with pytest.raises(DataError, match=rf"is compressed by .*add \.{ending} to its name"):
            read(wrong)
    assert read(tmp_path / "r.csv.gz") == read(tmp_path / "r.json.gz") == ["a"]
    bad = tmp_path / "bad.csv.gz"
    bad.write_bytes(gzip.compress(b"prompt,completion\na,\xff\n"))
    with pytest.raises(DataError, match=r"bad\.csv\.gz, line 2: byte 0xff is not UTF-8"):
        read(bad)
    for name in ("r.zip", "r.tar.gz", "r.tgz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=r"is an archive .* unpack it first"):
            read(tmp_path / name)
    with pytest.raises(DataError, match="parquet files are compressed inside"):
        read(tmp_path / "r.parquet.gz")
    with pytest.raises(DataError, match=r"cannot read \.txt\.gz; expected one of"):
        read(tmp_path / "r.txt.gz")


def test_a_configuration_of_a_local_file_is_told_to_do_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "r.jsonl", "a")
    recipe = DatasetRecipe(path=str(path), name="main", validation=0)
    assert prepare(recipe, tokenizer, seed=0).report.warnings == (
        f"dataset.name 'main' has no effect: {path} is local and has no configurations",
    )


def test_rows_of_a_folder_to_hold_out_are_those_of_its_validation_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    files = tmp_path / "set"
    write(files / "train.jsonl", "a", "b", "c")
    write(files / "validation.jsonl", "d")
    write(files / "test.jsonl", "e")
    folder = str(files)

    def texts(data: PreparedData) -> list[str]:
        return [data.encoder.decode(row.input_ids)[10] for row in data.validation]

    data = prepare(DatasetRecipe(path=folder, validation=folder), tokenizer, seed=0)
    assert (len(data.train), texts(data)) == (3, ["d"])
    assert (
        f"{folder}: read as train: train.jsonl; left out: test.jsonl (split test), "
        "validation.jsonl (split validation)"
    ) in data.report.warnings
    (files / "validation.jsonl").unlink()
    data = prepare(DatasetRecipe(path=folder, validation=folder), tokenizer, seed=0)
    assert (len(data.train), texts(data)) == (3, ["e"])


def test_a_folder_of_many_files_is_shown_in_a_few_lines(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for number in range(25):
        write(tmp_path / "set" / f"part{number:02}.jsonl", f"p{number}")
    report = prepare(
        DatasetRecipe(path=str(tmp_path / "set"), validation=0), tokenizer, seed=0
    ).report
    assert (report.num_rows, len(report.sources)) == (25, 25)
    lines = preflight_lines(report)
    assert len(lines) < 26
    assert "and 5 more sources" in lines
