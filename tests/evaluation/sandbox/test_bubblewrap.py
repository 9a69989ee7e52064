"""Which bubblewrap is started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kpsvd_tune.evaluation.sandbox.bubblewrap import (
    _readable_folders,
    bubblewrap_command,
    find_bubblewrap,
)


def put_bubblewrap(folder: Path, mode: int = 0o755) -> Path:
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    file = folder / "bwrap"
    file.write_text("#!/bin/sh\n")
    file.chmod(mode)
    return file


def test_the_first_of_path_is_found_by_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = (put_bubblewrap(tmp_path / name) for name in ("a", "b"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'none'}:{first.parent}:{second.parent}")
    assert find_bubblewrap() == str(first)
    assert bubblewrap_command(str(first), 1, None)[0] == str(first)


def test_a_python_below_tmp_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "base_prefix", "/tmp/a/python")
    _readable_folders.cache_clear()
    try:
        command = bubblewrap_command("/bin/bwrap", 1, None)
    finally:
        _readable_folders.cache_clear()
    at = command.index("--tmpfs")
    assert command[at + 1] == "/tmp"
    assert " ".join(command[at:]).count("--dir /tmp --dir /tmp/a --ro-bind-try /tmp/a/python") == 1


def test_a_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = put_bubblewrap(tmp_path / "a")
    (tmp_path / "b").mkdir(mode=0o755)
    (tmp_path / "b" / "bwrap").symlink_to(file)
    monkeypatch.setenv("PATH", str(tmp_path / "b"))
    assert find_bubblewrap() == str(file)


def test_relative_folders_of_path_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put_bubblewrap(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    for path in ("", ".", "../a", ":"):
        monkeypatch.setenv("PATH", path)
        assert find_bubblewrap() is None, path


def test_what_everybody_may_write_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    open_folder = put_bubblewrap(tmp_path / "a")
    open_folder.parent.chmod(0o1777)
    open_file = put_bubblewrap(tmp_path / "b", 0o777)
    linked = tmp_path / "c"
    linked.mkdir(mode=0o755)
    (linked / "bwrap").symlink_to(open_folder)
    no_program = put_bubblewrap(tmp_path / "d", 0o644)
    good = put_bubblewrap(tmp_path / "e")
    bad = (open_folder.parent, open_file.parent, linked, no_program.parent)
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, bad)))
    assert find_bubblewrap() is None
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, (*bad, good.parent))))
    assert find_bubblewrap() == str(good)
