"""Whether the network may be used, and that a hub which does not answer is not waited for."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpsvd_tune import offline
from kpsvd_tune.commands import main as cli
from kpsvd_tune.data.read.sources import _hub_access, open_sources
from kpsvd_tune.errors import DataError, ModelError
from kpsvd_tune.models import find_configuration, resolve_model
from kpsvd_tune.offline import go_offline, is_offline, no_answer


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)]
)
def test_offline_is_what_the_hubs_client_reads(monkeypatch, value: str | None, expected: bool):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if value is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert is_offline() is expected


def test_going_offline_tells_every_library(monkeypatch):
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE")
    for name in names:
        monkeypatch.setenv(name, "")
    go_offline()
    assert [os.environ[name] for name in names] == ["1", "1", "offline"]
    assert is_offline()


def test_datasets_have_a_variable_of_their_own(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert not is_offline()
    assert _hub_access("some/set")[0], "no call of the network"


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a hub at which nothing listens, which the network is allowed to be asked."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    return address


def test_a_hub_that_never_answers_is_not_waited_for(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "_HUB_SECONDS", 0.2)
    started = time.monotonic()
    assert no_answer(silent) is not None
    assert time.monotonic() - started < 5


def test_any_answer_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ssl
    import urllib.error
    import urllib.request

    def raises(error: Exception) -> None:
        def call(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(urllib.request, "urlopen", call)

    refused = ssl.SSLCertVerificationError("self-signed")
    raises(urllib.error.HTTPError("http://x", 404, "no", {}, None))  # type: ignore[arg-type]
    assert no_answer("http://x") is None
    raises(urllib.error.URLError(refused))
    assert no_answer("http://x") is None, "the hub's client may know the certificate"
    assert "self-signed" in str(no_answer("http://x", with_certificate=True))
    raises(urllib.error.URLError(OSError("no route")))
    assert no_answer("http://x") == "no route"


@pytest.mark.parametrize("source", ["some/thing", "gpt2"])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "ID", "hi"],
        ["chat", "ID"],
        ["eval", "ID", "--task", "gsm8k", "--path", "rows.jsonl", "-o", "scores"],
        ["merge", "ID", "-o", "out"],
        ["export", "ID", "--to", "lora", "-o", "out"],
        ["generate", "here", "hi", "--base", "ID"],
    ],
)
def test_an_id_is_refused_with_one_message_where_the_hub_is_out_of_reach(
    nobody: str,
    words: list[str],
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    started = time.monotonic()
    assert cli.run([source if word == "ID" else word for word in words]) == 2
    assert time.monotonic() - started < 5, "the hub was asked again and again"
    (line,) = capsys.readouterr().err.splitlines()
    option = "--base " if "--base" in words else ""
    place = f"model.path {source!r}" if words[0] == "eval" else f"{option}{source}"
    assert line.startswith(f"error: {place}: there is no such folder here, nothing of it is in")
    assert f"the hub cannot be asked: {nobody} does not answer (" in line
    assert "; run once with a connection and without --offline, or give the path of a" in line


def test_models_and_rows_of_a_hub_that_is_out_of_reach_come_from_the_cache_alone(
    nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    for look in (resolve_model, find_configuration):
        with pytest.raises(ModelError, match=f"the hub cannot be asked: {nobody} does not answer"):
            look("some/thing")
    with pytest.raises(DataError, match=f"the hub cannot be reached: {nobody} does not answer"):
        open_sources("some/rows")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("source", ["runs/x", "./x", "/nowhere/x", "~/no-such-run", "a/b/c"])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "PATH", "hi"],
        ["chat", "PATH"],
        ["eval", "PATH", "--task", "gsm8k"],
        ["merge", "PATH", "-o", "out"],
        ["export", "PATH", "--to", "lora", "-o", "out"],
        ["generate", "runs", "hi", "--base", "PATH"],
    ],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(
    words: list[str],
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def asked(*variables: str) -> None:
        raise AssertionError("the hub is asked")

    monkeypatch.setattr("kpsvd_tune.recipe.paths.hub_problem", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "y").mkdir(parents=True)
    assert cli.run([source if word == "PATH" else word for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    what = "folder or file" if "--base" in words else "run, adapter or model"
    assert f"there is no {what} {source}" in line
    assert ("there is a folder runs here" in line) is (source == "runs/x")


def test_an_id_whose_owner_is_a_folder_here_is_taken_from_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "owner").mkdir()
    with pytest.raises(ModelError, match=r"model\.path: there is no .*: hf download owner/name"):
        resolve_model("owner/name")
    with pytest.raises(DataError, match=r"dataset\.path: there is no .*hf download owner/name"):
        open_sources("owner/name")
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", tmp_path / "hub")
    assert resolve_model("owner/name").folder == snapshot
