"""What the package says it was installed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.runs.installed import installed_from


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds what an installer wrote of a package named madeup."""
    folder = tmp_path / "madeup-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: madeup\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_package_without_a_direct_url_came_from_an_index(package: Path) -> None:
    assert installed_from("madeup") == {"kind": "index"}


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (
            {"url": "file:///home/me/src", "dir_info": {"editable": True}},
            {"kind": "url", "url": "file:///home/me/src"},
        ),
        (
            {
                "url": "https://me:secret@host.example:8443/a/b.git",
                "vcs_info": {"vcs": "git", "commit_id": "0123abc"},
            },
            {"kind": "url", "url": "https://host.example:8443/a/b.git", "commit": "0123abc"},
        ),
        ({"dir_info": {}}, {}),
        ([], {}),
    ],
)
def test_the_url_of_what_it_was_installed_from_is_told_without_a_password(
    package: Path, written: Any, told: dict[str, str]
) -> None:
    (package / "direct_url.json").write_text(json.dumps(written))
    assert installed_from("madeup") == told


def test_what_is_not_known_is_not_guessed(package: Path) -> None:
    (package / "direct_url.json").write_text("{")
    assert installed_from("madeup") == {}
    assert installed_from("not-installed-at-all") == {}
