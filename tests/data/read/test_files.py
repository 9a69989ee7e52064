"""Reading local files: what is read, and the message for each fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset  # type: ignore[import-untyped]

from kpsvd_tune.data.read import files
from kpsvd_tune.data.read.files import Row, parse_json
from kpsvd_tune.data.read.sources import RowSource, _hub, is_local_file, load_rows
from kpsvd_tune.errors import DataError

PAIR = '{"prompt": "1+1?", "completion": "2"}'


def read_file(path: Path) -> list[Row]:
    return list(load_rows(str(path)).rows)


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    rows = [{"prompt": 'a, "b"\nc', "completion": "é"}, {"prompt": "d", "completion": "e"}]
    write(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path, "rows.json", json.dumps(rows, indent=1))
    write(tmp_path, "rows.csv", 'prompt,completion\n"a, ""b""\nc",é\nd,e\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    places = {}
    for suffix in ("jsonl", "json", "csv", "parquet"):
        found = read_file(tmp_path / f"rows.{suffix}")
        assert [dict(row.values) for row in found] == rows
        places[suffix] = [(row.unit, row.number) for row in found]
    assert places == {
        "jsonl": [("line", 1), ("line", 2)],
        "json": [("row", 1), ("row", 2)],
        "csv": [("line", 2), ("line", 4)],  # the quoted line break counts
        "parquet": [("row", 1), ("row", 2)],
    }


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + PAIR.encode(),
        PAIR.encode() + b"\r\n",
        b"\n\n" + PAIR.encode() + b"\n   \n",
        b"\r" + PAIR.encode() + b"\r",
    ],
    ids=["byte order mark", "crlf", "blank lines", "cr"],
)
def test_harmless_oddities_are_read(tmp_path: Path, content: bytes) -> None:
    (row,) = read_file(write(tmp_path, "rows.jsonl", content))
    assert row.values == {"prompt": "1+1?", "completion": "2"}


def test_line_separator_inside_a_string_does_not_cut_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", '{"prompt": "a\u2028b\x85c", "completion": "d"}\n')
    assert read_file(path)[0].values["prompt"] == "a\u2028b\x85c"


def test_csv_spaces_behind_commas_are_no_text_where_the_header_has_them(tmp_path: Path) -> None:
    path = write(tmp_path, "r.csv", 'prompt, completion\nq, a\n"q, 2", "a ""b"""\n"r"," c"\n')
    rows = [dict(row.values) for row in files.read_file(path)]
    assert rows == [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q, 2", "completion": 'a "b"'},
        {"prompt": "r", "completion": " c"},
    ]
    plain = write(tmp_path, "p.csv", 'prompt,completion\nq, a\nr," ""b"""\n')
    assert [row.values["completion"] for row in files.read_file(plain)] == [" a", ' "b"']


def test_csv_keeps_line_ends_inside_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", 'prompt,completion\r\n"a\r\nb",c\r\n')
    assert read_file(path)[0].values == {"prompt": "a\r\nb", "completion": "c"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", PAIR + "\n{oops}\n", r"r\.jsonl, line 2: not valid JSON at column 2"),
        # The example is of the file's own columns.
        (
            "r.jsonl",
            '{"sku": "1", "shelf": "x"}\n{oops}\n',
            r'such as {"sku": "...", "shelf": "..."}; found .*: correct the line, or remove it',
        ),
        ("r.jsonl", f"[{PAIR}]", r"line 1: expected a JSON object .* rename the file to \.json"),
        ("r.jsonl", '"text"', r"line 1: expected a JSON object .* found a text"),
        ("r.jsonl", '{"a": 1, "a": 2}', r"line 1: the key 'a' occurs twice in one object"),
        ("r.jsonl", '{"x": {"b": 1, "b": 2}}', r"line 1: the key 'b' occurs twice"),
        ("r.jsonl", "", r"r\.jsonl: holds no rows; expected at least one"),
        ("r.jsonl", b'{"prompt": "caf\xe9"}', r"line 1: byte 0xe9 is not UTF-8"),
        ("r.jsonl", PAIR.encode("utf-16"), r"is UTF-16 text; expected UTF-8 text"),
        ("r.jsonl", PAIR.encode("utf-16-le"), r"starts with NUL bytes, .* save it with that"),
        ("r.jsonl", b"\x1f\x8b\x08", r"is compressed by gzip; .* add \.gz to its name"),
        ("r.jsonl", "[" * 100_000, r"line 1: the nesting is too deep"),
        ("r.json", PAIR + "\n" + PAIR, r"r\.json: not valid JSON .* rename it to \.jsonl"),
        ("r.json", '{"data": []}', r"found one object with the keys data; save the array under"),
        ("r.json", '{"train": [{"a": 1}], "n": 2}', r"save the array under 'train' as the whole"),
        (
            "r.json",
            '{"a": ["x"], "b": ["y"]}',
            r"seem to be columns: write one object for each row",
        ),
        ("r.json", '{"0": {"a": "x"}}', r"seem to be rows by number: save them as an array"),
        (
            "r.json",
            PAIR,
            r"keys prompt, completion; if this is one row, write \[\.\.\.\] around it",
        ),
        (
            "r.json",
            '{"messages": [{"role": "user"}]}',
            r"if this is one row, write \[\.\.\.\] around",
        ),
        ("r.jsonl", '[{"role": "user"}]', r'line is a chat, write {"messages": \[\.\.\.\]} around'),
        (
            "r.jsonl",
            '[["q", "a"]]',
            r"found an array; rename the file to \.json if it is one array",
        ),
        (
            "r.csv",
            'a,b\n"x", "y"\n',
            r"line 2: a field has spaces before its quotes \('\"y\"'\), so",
        ),
        ("r.csv", 'a,b\nx, "y, z"\n', r"line 2: a field has spaces before its quotes"),
        ("r.csv", 'a, "b",c\nx,y,z\n', r"line 1: a field has spaces before its quotes"),
        ("r.json", "[1]", r"r\.json, row 1: expected a JSON object .* found a number"),
        ("r.json", "7", r"expected a JSON array of objects, found a number"),
        ("r.json", "[]", r"holds no rows"),
        ("r.csv", "prompt,prompt\na,b\n", r"line 1: the column 'prompt' occurs twice"),
        ("r.csv", "prompt,completion\na,b,c\n", r"line 2: found 3 fields, expected 2 \(prompt, c"),
        ("r.csv", 'prompt,completion\n"a,b\n', r"r\.csv, line 2: not valid csv: .* double quotes"),
        ("r.csv", "prompt;completion\na;b\n", r"separated by semicolons; expected commas"),
        ("r.csv", "prompt,completion\n", r"holds no rows"),
        ("r.parquet", b"PAR1 broken", r"r\.parquet: not a readable parquet file"),
        ("r.txt", "text", r"cannot read \.txt; expected one of \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_a_fault_names_file_line_finding_and_cure(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_file(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("told", "separator"), [("sep=,", ","), ("SEP=;", ";"), ('"sep=\t"', "\t")]
)
def test_the_separator_that_excel_names_is_followed(
    tmp_path: Path, told: str, separator: str
) -> None:
    lines = [told, "prompt|completion", "p|c, d; e", "q|r|s"]
    text = "\r\n".join(lines).replace("|", separator).replace("c, d; e", '"c, d; e"')
    path = write(tmp_path, "r.csv", text)
    rows = list(files.read_file(path))
    assert (rows[0].number, rows[0].values) == (3, {"prompt": "p", "completion": "c, d; e"})
    assert "line 4: found 3 fields, expected 2" in str(rows[1].fault)


def test_a_parquet_column_of_maps_holds_objects(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def save(*pairs: tuple[str, str]) -> Path:
        column = pa.array([list(pairs)], type=pa.map_(pa.string(), pa.string()))
        pq.write_table(pa.table({"translation": column}), tmp_path / "r.parquet")
        return tmp_path / "r.parquet"

    (row,) = read_file(save(("en", "Hello"), ("fr", "Bonjour")))
    assert row.values == {"translation": {"en": "Hello", "fr": "Bonjour"}}
    with pytest.raises(DataError, match="row 0: .*duplicate key.* Expected each key of a map once"):
        read_file(save(("en", "Hello"), ("en", "Hi")))


@pytest.mark.parametrize("is_known", [True, False])
def test_a_hub_that_does_not_answer_is_asked_once(
    is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    asked: list[bool] = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append(constants.HF_HUB_OFFLINE)
        if not is_known:
            raise ConnectionError("nothing is cached")
        return Dataset.from_list([{"prompt": "a"}])

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://hub.invalid/{is_known}")
    monkeypatch.setattr("kpsvd_tune.offline.no_answer", lambda address: "name not known")
    monkeypatch.setattr("datasets.load_dataset", load)
    if is_known:
        loaded = load_rows("owner/name")
        assert [row.values for row in loaded.rows] == [{"prompt": "a"}]
        assert loaded.notes == (
            "the hub cannot be reached: owner/name is read from the local cache",
        )
    else:
        with pytest.raises(
            DataError,
            match=r"the local cache, and the hub cannot be reached: http.*/False does not answer "
            r"\(name not known\): nothing is cached",
        ):
            load_rows("owner/name")
    assert asked == [True]
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_has_no_such_data_set_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def load(*arguments: Any, **options: Any) -> None:
        assert not constants.HF_HUB_OFFLINE
        raise ValueError("doesn't exist on the Hub")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("kpsvd_tune.data.read.sources.hub_problem", lambda *variables: None)
    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError, match="not loadable from the hub: doesn't exist on the Hub"):
        load_rows("owner/name")


def test_missing_file_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", PAIR)
    with pytest.raises(DataError, match=r"there is no such file .* that folder has train\.jsonl"):
        read_file(tmp_path / "trian.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="is a folder; expected a file"):
        read_file(tmp_path / "folder.json")


def test_json_positions_count_lines() -> None:
    with pytest.raises(ValueError, match="line 2"):
        parse_json("{\n oops}")


def test_sources_follow_each_other_and_keep_their_places(tmp_path: Path) -> None:
    first = write(tmp_path, "a.jsonl", PAIR)
    second = write(tmp_path, "b.csv", "prompt,completion\nq,r\n")
    loaded = load_rows([str(first), str(second)])
    assert [row.where for row in loaded.rows] == [f"{first}, line 1", f"{second}, line 2"]
    assert loaded.notes == ()
    with pytest.raises(DataError, match=r"dataset\.path is an empty list"):
        load_rows([])


def test_split_of_a_local_file_slices_or_is_noted(tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(5))))

    def numbers(split: str) -> list[int]:
        return [row.values["n"] for row in load_rows(path, split=split).rows]

    assert numbers("train") == [0, 1, 2, 3, 4]
    assert numbers("train[:2]") == [0, 1]
    assert numbers("train[1:-1]") == [1, 2, 3]
    assert load_rows(path, split="test").notes == (
        f"{path}: is one file without splits: the split 'test' has no effect",
    )
    with pytest.raises(DataError, match="keeps none of the 5 rows"):
        load_rows(path, split="train[9:]")
    assert numbers("train[:40%]") == [0, 1]
    assert numbers("train[40%:]") == [2, 3, 4]
    assert numbers("train[:1] + train[-2:]") == [0, 3, 4]


def test_what_counts_as_a_local_file(tmp_path: Path) -> None:
    assert is_local_file("data/missing.jsonl")
    assert is_local_file("./notes.txt")
    assert not is_local_file("owner/name")
    assert not is_local_file(str(tmp_path))


def test_hub_dataset_that_cannot_be_had_says_so() -> None:
    with pytest.raises(DataError, match=r"'nobody/nothing'.* the local cache \(offline\): ") as got:
        load_rows("nobody/nothing", name="main")
    assert "give a local file (.jsonl, .json, .csv, .parquet)" in str(got.value)


def test_a_text_longer_than_csvs_usual_limit_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", "prompt,completion\na," + "x" * 200_000 + "\n")
    assert len(read_file(path)[0].values["completion"]) == 200_000


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", PAIR + "\n{oops}\n")
    assert next(iter(files.read_file(path))).number == 1
    assert len(load_rows(str(path), split="train[:1]").rows) == 1
    with pytest.raises(DataError, match="line 2"):
        load_rows(str(path))


def test_a_parquet_file_is_read_in_parts(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": [str(n) for n in range(2500)]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = read_file(tmp_path / "rows.parquet")
    assert [(row.number, row.values["prompt"]) for row in rows[998:1002]] == [
        (n + 1, str(n)) for n in range(998, 1002)
    ]
    assert len(rows) == 2500


@pytest.mark.parametrize(("split", "num_rows"), [("train", 3), ("train[1:]", 2), ("train[-1:]", 1)])
def test_a_dataset_can_be_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, num_rows: int
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, "train.jsonl", "".join(f'{{"prompt": "{n}"}}\n' for n in range(3)))
    # A folder stands in for the hub, which is not reached here.
    monkeypatch.setattr("kpsvd_tune.data.read.sources.hub_problem", lambda *variables: None)

    def open_hub(split: str) -> RowSource:
        return _hub(str(folder), None, split, True)

    source = open_hub(split)
    values = [row.values["prompt"] for row in source.read()]
    assert values == ["0", "1", "2"][-num_rows:]
    assert [row.values for row in source.read()] == [{"prompt": each} for each in values]
    first = source.fingerprint()
    assert open_hub(split).fingerprint() == first
    write(folder, "train.jsonl", '{"prompt": "other"}\n')
    assert open_hub(split).fingerprint() != first
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    with pytest.raises(DataError, match=r"train\[:100\], where dataset\.streaming is true"):
        open_hub("train[:10%]")


def test_a_parquet_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(columns, names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(DataError, match="column 'prompt' occurs twice"):
        read_file(tmp_path / "r.parquet")


def test_parquet_text_that_is_no_text_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": pa.array([b"a", b"\xff"]).view(pa.string())})
    pq.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(DataError, match="not a readable parquet file behind row 0: .*utf-8"):
        read_file(tmp_path / "r.parquet")
