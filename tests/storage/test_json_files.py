"""Reading back what was written: depth, types, and what lies there instead of a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from kpsvd_tune.errors import CheckpointError, InputError
from kpsvd_tune.storage.json_files import MAX_DEPTH, check_types, parse_json, read_json


@dataclass(frozen=True)
class Pair:
    name: str
    sizes: tuple[int, ...]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[" * 10_000 + b"]" * 10_000, "is nested deeper than 100 levels"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "is nested deeper than 100 levels"),
        (b"[1]", "input should be a valid dictionary, got a list of 1"),
        (b"9" * 5000, "is not JSON"),
    ],
)
def test_what_is_no_object_is_refused_with_the_file_and_a_cure(
    tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        read_json(file, cure="write it again")
    assert str(refused.value).startswith(f"{file} ")
    assert said in str(refused.value)
    assert str(refused.value).endswith("; write it again")


def test_what_nests_within_bounds_is_read() -> None:
    depth = MAX_DEPTH - 1
    assert parse_json('{"a":' * depth + "1" + "}" * depth)


def test_types_are_those_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "pair.json"
    file.write_text('{"name": "x", "sizes": [1, 2]}')
    assert read_json(file, Pair) == Pair("x", (1, 2))
    with pytest.raises(ValueError, match=r'name: .*, got a list of 0; sizes.0: .*, got "one"'):
        check_types({"sizes": ["one"], "name": []}, Pair)


def test_many_faults_are_counted() -> None:
    with pytest.raises(ValueError, match=r"0: .* 1: .* 2: .* and 7 more faults\)$"):
        check_types(["x"] * 10, list[int])


@pytest.mark.parametrize("kind", ["pipe", "folder", "absent"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "results.json"
    said = {
        "pipe": "it is a named pipe, socket or device, and a file is expected",
        "folder": "it is a folder, and a file is expected",
        "absent": "No such file or directory",
    }[kind]
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(InputError, match=f"results.json cannot be read: {said}; was it edited"):
        read_json(file, error=InputError)
