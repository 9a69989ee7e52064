"""Locks: held by one, lifted by death, and done without where the file system has none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kpsvd_tune.errors import CheckpointError, ResourceError
from kpsvd_tune.storage import locks
from kpsvd_tune.storage.durable import replace_file, write_folder
from kpsvd_tune.storage.locks import hold, is_shared, lock_folder, share

HOLDER = """
import sys
from pathlib import Path
from kpsvd_tune.storage.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_the_message_names_the_process_that_holds_a_folder_and_a_kill_lifts_it(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"locked\n"
        # Asked twice: a refused process leaves the words of the holder as they are.
        for _ in range(2):
            with pytest.raises(CheckpointError) as caught, lock_folder(tmp_path):
                pass
            assert f"in use by another run (process {other.pid} on {socket.gethostname()})" in str(
                caught.value
            )
        other.kill()
        other.wait()
        with lock_folder(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert (tmp_path / ".lock").read_text() == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    locks._warn_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".file.0123abcd.tmp").touch()
    with caplog.at_level(logging.WARNING), lock_folder(tmp_path):
        with hold(tmp_path / "other.lock", wait=True) as held:
            assert held is None
        replace_file(tmp_path / "file", b"content")
        with write_folder(tmp_path / "folder") as aside:
            (aside / "inside").touch()
        share(tmp_path / "file")
        assert is_shared(tmp_path / "file")
    (record,) = caplog.records
    assert f"has no locks ({os.strerror(number)}): nothing keeps a second run" in record.message
    assert (tmp_path / "file").read_bytes() == b"content"
    # Nobody can tell whether its writer is at work.
    assert (tmp_path / ".file.0123abcd.tmp").exists()
    locks._warn_once.cache_clear()


def test_another_refusal_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ResourceError, match=r"could not lock .*\.lock: .*nput/output error"):
        lock_folder(tmp_path).__enter__()


def test_a_shared_file_is_in_use_until_its_last_process_ends(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not is_shared(tmp_path / "file")
    code = (
        "import sys, pathlib; from kpsvd_tune.storage.locks import share\n"
        "for _ in range(2): share(pathlib.Path(sys.argv[1]))\n"
        "print('shared', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"shared\n"
        assert is_shared(tmp_path / "file")
        other.kill()
        other.wait()
        assert not is_shared(tmp_path / "file")
    assert is_shared(tmp_path / "missing")
