"""A committed folder is whole or not there, at every moment and whatever fails."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from faulty_os import FaultyOs, raising

from kpsvd_tune.errors import CheckpointError, ResourceError
from kpsvd_tune.storage import durable
from kpsvd_tune.storage.commit import MANIFEST, commit, read_committed
from kpsvd_tune.storage.json_files import to_json

FILES = {"a.bin": b"alpha" * 20, "b.json": b'{"b": 1}', "empty": b""}


class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` may catch it."""


def failing_os(number: int, moment: str, fault: BaseException) -> FaultyOs:
    # Writes that the disk takes only a part of: the rest has to follow.
    return FaultyOs(raising(fault), number, moment, largest_write=40)


def save_two(folder: Path) -> None:
    """What a run does: commit the newer, then delete the older."""
    commit(folder / "step-2", FILES.items())
    durable.remove_folder(folder / "step-1")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    commit(tmp_path / "step-1", FILES.items())
    return tmp_path


def whole(folder: Path) -> list[str]:
    found = []
    for each in sorted(folder.glob("step-*")):
        try:
            assert read_committed(each) == FILES
        except CheckpointError:
            continue
        found.append(each.name)
    return found


def count_operations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    counting = failing_os(-1, "before", Killed())
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", counting)
        save_two(folder)
    return counting.calls


def test_files_come_back(two):
    assert read_committed(two / "step-1") == FILES


def test_every_kind_of_operation_goes_through_the_hook(two, monkeypatch):
    calls = count_operations(two, monkeypatch)
    assert whole(two) == ["step-2"]
    assert set(calls) == {
        "makedirs",
        "open",
        "write",
        "fsync",
        "close",
        "replace",
        "unlink",
        "rmdir",
    }
    # Three files, the manifest, the folder, its parent after the rename; then the deletion.
    assert calls.count("fsync") >= 6
    assert calls.index("unlink") > calls.index("replace")


@pytest.mark.slow
def test_a_kill_at_any_operation_leaves_a_whole_folder(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    commit(source / "step-1", FILES.items())
    number_of_calls = len(
        count_operations(Path(shutil.copytree(source, tmp_path / "count")), monkeypatch)
    )
    outcomes = set()
    for number in range(number_of_calls):
        for moment in ("before", "after"):
            folder = Path(shutil.copytree(source, tmp_path / f"{number}-{moment}"))
            with monkeypatch.context() as patch:
                patch.setattr(durable, "os", failing_os(number, moment, Killed()))
                with pytest.raises(Killed):
                    save_two(folder)
            found = whole(folder)
            # Nothing half-written stands under a checkpoint's name.
            assert found == [each.name for each in sorted(folder.glob("step-*"))]
            assert found, f"no whole folder after a kill {moment} operation {number}"
            outcomes.add(tuple(found))
            # The next run of the same save gets through, whatever lies around.
            if "step-2" not in found:
                save_two(folder)
                assert whole(folder) == ["step-2"]
    assert outcomes == {("step-1",), ("step-1", "step-2"), ("step-2",)}


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ENOENT, "the folder vanished"),
        (errno.EIO, "try again, or choose an output_dir on another disk"),
        (errno.ENOTDIR, "a file is in the way; remove it, or choose another output_dir"),
    ],
)
def test_a_failing_disk_is_named_with_path_size_and_cure(
    two, tmp_path_factory, monkeypatch, number, cure
):
    fault = OSError(number, os.strerror(number))
    copy = Path(shutil.copytree(two, tmp_path_factory.mktemp("count") / "two"))
    first_write = count_operations(copy, monkeypatch).index("write")
    monkeypatch.setattr(durable, "os", failing_os(first_write, "before", fault))
    with pytest.raises(ResourceError) as caught:
        commit(two / "step-2", FILES.items())
    pattern = rf"could not write 100 bytes to {two}/\.step-2\.[0-9a-f]{{8}}\.tmp/a\.bin: "
    assert re.search(pattern, str(caught.value))
    assert not list(two.glob(".step-2*"))
    assert os.strerror(number) in str(caught.value)
    assert cure in str(caught.value)
    assert whole(two) == ["step-1"]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_cut_or_missing_file_is_named(two, name):
    path = two / "step-1" / name
    data = path.read_bytes()
    for cut in {0, len(data) // 2, len(data) - 1} - {len(data), -1}:
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            read_committed(two / "step-1")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_committed(two / "step-1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.bin", "b.json", MANIFEST])
def test_any_flipped_byte_is_named(two, name):
    path = two / "step-1" / name
    data = bytearray(path.read_bytes())
    for position in range(len(data)):
        for flip in (0x01, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= flip
            path.write_bytes(bytes(damaged))
            with pytest.raises(CheckpointError, match=str(path)):
                read_committed(two / "step-1")


@pytest.mark.parametrize("name", ["a.bin", MANIFEST])
def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(two, name):
    path = two / "step-1" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is a named pipe"):
        read_committed(two / "step-1")


def test_a_renamed_folder_is_not_taken_for_another_step(two):
    (two / "step-1").rename(two / "step-9")
    with pytest.raises(CheckpointError, match="is of step-1; expected step-9"):
        read_committed(two / "step-9")


def test_a_later_format_is_named(two):
    path = two / "step-1" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2; this version reads 1: update"):
        read_committed(two / "step-1")


def test_a_folder_is_never_written_twice(two):
    with pytest.raises(CheckpointError, match="exists already"):
        commit(two / "step-1", {"a.bin": b"other"}.items())
    assert whole(two) == ["step-1"]


def test_replaced_file_is_old_or_new(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    durable.replace_file(path, b"old")
    for number in range(20):
        for moment in ("before", "after"):
            with monkeypatch.context() as patch:
                patch.setattr(durable, "os", failing_os(number, moment, Killed()))
                try:
                    durable.replace_file(path, b"new")
                except Killed:
                    assert path.read_bytes() in (b"old", b"new")
                else:
                    assert path.read_bytes() == b"new"
            durable.replace_file(path, b"old")


def test_json_refuses_what_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"loss": float("nan")})
