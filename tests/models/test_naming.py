"""The base's name for cards: the hub's where it is known, and no folder of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kpsvd_tune.models import describe_base
from kpsvd_tune.report.card import Base


def folder_of(path: Path, name_or_path: object = None, card: str | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"_name_or_path": name_or_path}))
    if card is not None:
        (path / "README.md").write_text(card)
    return path


@pytest.mark.parametrize("name", ["owner/name", "gpt2"])
def test_what_is_no_folder_here_is_an_id_of_the_hub(name: str):
    assert describe_base(name) == Base(name, True)


def test_the_snapshot_of_an_id_tells_its_licence(tmp_path: Path):
    folder = folder_of(tmp_path / "s", card="---\ntags: [x]\nlicense: apache-2.0\n---\n# Model\n")
    assert describe_base("owner/name", folder) == Base("owner/name", True, "apache-2.0")


def test_a_folder_of_the_hubs_cache_is_named_by_its_id(tmp_path: Path):
    folder = folder_of(tmp_path / "models--owner--name" / "snapshots" / "abc")
    assert describe_base(str(folder)) == Base("owner/name", True)


def test_a_configuration_may_know_where_the_model_came_from(tmp_path: Path):
    folder = folder_of(tmp_path / "mine", "owner/name")
    assert describe_base(str(folder)) == Base("owner/name", True)


@pytest.mark.parametrize("known", [None, 3, "", "tiny", "/home/ann/tiny", "./tiny", "a/b/c"])
def test_a_folder_is_named_without_its_path(tmp_path: Path, known: object):
    folder = folder_of(tmp_path / "mine", known)
    assert describe_base(str(folder)) == Base("mine", False)


def test_a_folder_beside_it_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of(tmp_path / "mine", "models/tiny")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert describe_base(str(folder)) == Base("mine", False)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/ann/models/tiny.gguf", "tiny.gguf"),
        ("package:gguf_models/tiny.gguf", "package:gguf_models/tiny.gguf"),
    ],
)
def test_files_are_named_by_their_own_name(path: str, name: str):
    assert describe_base(path) == Base(name, False)


@pytest.mark.parametrize(
    "card", ["license: mit\n", "# x\n---\nlicense: mit\n---\n", "---\nlicense:\n- mit\n---\n", ""]
)
def test_only_the_metadata_of_a_card_states_a_licence(tmp_path: Path, card: str):
    assert describe_base(str(folder_of(tmp_path / "mine", card=card))).licence is None


def test_a_damaged_configuration_tells_nothing(tmp_path: Path):
    folder = folder_of(tmp_path / "mine")
    (folder / "config.json").write_text("{")
    assert describe_base(str(folder)) == Base("mine", False)
    (folder / "config.json").write_text("[1]")
    assert describe_base(str(folder)) == Base("mine", False)
