"""adapter_config.json of wrong types, damaged, or meant to make a reader wait."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.errors import AdapterError
from kpsvd_tune.runs.adapter_folder import check_adapter, read_adapter_config
from kpsvd_tune.storage import patterns

RIGHT: dict[str, Any] = {
    "peft_type": "KPSVD",
    "base_model_name_or_path": "owner/name",
    "target_modules": ["q_proj"],
    "layers": {"m.q_proj": {"shape": [4, 4, 8, 8], "rank": 2, "fingerprint": 1.5}},
    "task_type": "CAUSAL_LM",
}


def write(folder: Path, content: object) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_what_we_write_is_read(tmp_path: Path) -> None:
    found = read_adapter_config(write(tmp_path, RIGHT))
    assert found.base_model_name_or_path == "owner/name"
    assert found.layers is not None
    assert found.layers["m.q_proj"].rank == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: input should be a valid string"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path: .*, got a list of 1"),
        ({"layers": []}, "layers: .*, got a list of 0"),
        ({"layers": {"a": 3}}, "layers.a: .*, got 3"),
        ({"layers": {"a": {"shape": [1, 2], "rank": 1}}}, "layers.a.shape: "),
        ({"layers": {"a": {"shape": [1, 2, 3, 4], "rank": -1}}}, "layers.a.rank: "),
        ({"layers": {"a": {"shape": [1, 2, 3, 10**12], "rank": 1}}}, "layers.a.shape.3: "),
        ({"layers": {"a": {"rank": 1}}}, "layers.a.shape: field required"),
        ({"target_modules": {"a": 1}}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"dropout": "much"}, "dropout: "),
        ({"revision": 7}, "revision: "),
        ({"peft_type": "LORA"}, "is a LORA adapter: expected one of KPSVD"),
        ({"peft_type": ["KPSVD"]}, "adapter: expected one of KPSVD"),
    ],
)
def test_wrong_types_are_named_with_the_file(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdapterError, match=said):
        read_adapter_config(write(tmp_path, {**RIGHT, **change}))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is not JSON"), (b"[" * 10_000, "nested deeper"), (b"[1]", "valid dictionary")],
)
def test_what_is_no_object_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError, match=f"adapter_config.json .*{said}.*expected the file"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_is_refused_before_anyone_waits_for_it(tmp_path: Path, name: str) -> None:
    write(tmp_path, RIGHT)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(AdapterError, match=f"{name} cannot be read: it is a named pipe"):
        check_adapter(tmp_path, ["m.q_proj"])


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_foreign_pattern_that_backtracks_is_refused(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    write(tmp_path, {**RIGHT, key: "(a+)+b"})
    with pytest.raises(AdapterError, match=f"{key} takes more than 0.2 s to match"):
        check_adapter(tmp_path, ["a" * 60])
