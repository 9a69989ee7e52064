"""One writer of files and one of folders: whole or not there, with the user's modes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpsvd_tune.errors import InputError, ResourceError
from kpsvd_tune.storage import durable
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import (
    make_folder,
    remove_folder,
    remove_leftovers,
    replace_file,
    write_folder,
)
from kpsvd_tune.storage.locks import lock_descriptor


@pytest.fixture
def mask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_and_folders_have_the_modes_of_the_umask(tmp_path: Path, mask: int) -> None:
    replace_file(tmp_path / "file", b"")
    with write_folder(tmp_path / "folder") as aside:
        (aside / "inner").mkdir(mode=0o700)
        (aside / "inner" / "private").touch(mode=0o600)
        (aside / "link").symlink_to("/dev/null")
    names = ("file", "folder", "folder/inner", "folder/inner/private")
    assert [mode(tmp_path / name) for name in names] == [0o640, 0o750, 0o750, 0o640]


def test_a_folder_of_a_group_keeps_it(tmp_path: Path, mask: int) -> None:
    tmp_path.chmod(0o2750)
    with write_folder(tmp_path / "folder") as aside:
        (aside / "inner").mkdir()
    assert mode(tmp_path / "folder" / "inner") == 0o2750


def test_all_in_a_folder_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with write_folder(tmp_path / "folder") as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "a").write_text("a")
        (aside / "b").write_text("b")
        synced.clear()
    assert sorted(synced[:4]) == sorted(["inner", "a", "b", aside.name])
    assert synced[4:] == [tmp_path.name]


def test_a_failed_writer_leaves_nothing_and_what_was_there_stays(tmp_path: Path) -> None:
    with write_folder(tmp_path / "folder") as aside:
        (aside / "old").touch()
    with (  # noqa: PT012
        pytest.raises(InputError, match="no"),
        write_folder(tmp_path / "folder", replace=True) as aside,
    ):
        (aside / "new").touch()
        raise InputError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["old"]


def test_a_folder_is_replaced_only_where_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, replace in (("first", False), ("second", True)):
        with write_folder(tmp_path / "folder", replace=replace) as aside:
            (aside / name).touch()
    with (
        pytest.raises(ResourceError, match="put there meanwhile; remove it, or choose another --o"),
        explained("merge", "an --output"),
        write_folder(tmp_path / "folder") as aside,
    ):
        (aside / "third").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["second"]


def test_what_killed_writers_left_goes_and_what_is_written_stays(tmp_path: Path) -> None:
    dead, alive, other = (tmp_path / f".a[b].{x * 8}.tmp" for x in "01z")
    for file in (dead, alive, other):
        file.touch()
    foreign = tmp_path / ".a[b]c.00000000.tmp"
    foreign.mkdir()
    descriptor = os.open(alive, os.O_RDONLY)
    assert lock_descriptor(descriptor)
    replace_file(tmp_path / "a[b]", b"content")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a[b]", alive.name, other.name, foreign.name
    }  # fmt: skip
    remove_leftovers(tmp_path)
    assert not foreign.exists()
    os.close(descriptor)
    remove_leftovers(tmp_path)
    assert not alive.exists()


def test_a_new_file_that_is_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makes = []

    def lock(descriptor: int) -> bool | None:
        makes.append(descriptor)
        if len(makes) == 1:
            return False
        if len(makes) == 2:
            for file in tmp_path.glob(".*"):
                file.unlink()
        return lock_descriptor(descriptor)

    monkeypatch.setattr(durable, "lock_descriptor", lock)
    replace_file(tmp_path / "file", b"content")
    assert len(makes) >= 3
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_link_to_a_folder_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    remove_folder(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "kept").exists()


def test_every_folder_that_is_made_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
