"""Locks on files: the system lifts them however the process that holds one ends.

Some network disks have none and say so. Work goes on there without, after a warning: whatever is
written is whole there too, and two processes at most do the same work.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from kpsvd_tune.errors import FolderInUseError, ResourceError
from kpsvd_tune.storage.disk import explained

_log = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# Descriptors of files that this process shares, by device and inode.
_shared: dict[tuple[int, int], int] = {}


@contextlib.contextmanager
def hold(file: Path, *, wait: bool) -> Iterator[bool | None]:
    """Hold the exclusive lock of a file that is kept for it, and made if need be.

    Yields True; False where another process holds it and is not to be waited for; None where the
    file system has no locks. OSError: the file cannot be made.
    """
    # The soft lock, which the package falls back to, would outlive a killed process.
    lock = filelock.FileLock(file, blocking=wait, thread_local=False, fallback_to_soft=False)
    held: bool | None = True
    try:
        lock.acquire()
    except filelock.Timeout:
        held = False
    except OSError as error:
        _refused(error)
        held = None
    try:
        yield held
    finally:
        lock.release()


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder that exists.

    FolderInUseError names the process that holds it; ResourceError: the lock cannot be made.
    """
    file = folder / ".lock"
    with contextlib.ExitStack() as stack:
        with explained(f"lock {file}"):
            held = stack.enter_context(hold(file, wait=False))
            if held:
                file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        if held is False:
            holder = file.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
            raise FolderInUseError(
                f"{folder} is in use by another run ({holder}); wait for it, stop it, or choose "
                "another output_dir"
            )
        try:
            yield
        finally:
            if held:
                with contextlib.suppress(OSError):
                    os.truncate(file, 0)


@contextlib.contextmanager
def join_folder(folder: Path, who: str) -> Iterator[None]:
    """Share a folder that exists with others that join it, and keep out who wants it alone.

    `who` tells that one what the folder is in use by. FolderInUseError: it is held alone;
    ResourceError: the file system has no locks, so nothing would keep the others apart.
    """
    file = folder / ".lock"
    with explained(f"lock {file}"):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
            raise FolderInUseError(
                f"{folder} is in use by a call that does not share it ({holder}); wait for it, "
                "stop it, or choose another output_dir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise ResourceError(
                f"the file system of {folder} has no locks ({error.strerror}), so nothing would "
                "keep several workers from the same work; expected an output_dir on one that has, "
                "or a single call that does not share it"
            ) from error
        with explained(f"write {file}"):
            file.write_text(who, encoding="utf-8")
        yield
    finally:
        os.close(descriptor)


def lock_descriptor(descriptor: int) -> bool | None:
    """Lock an open file or folder until its descriptor is closed; the result is as by `hold`."""
    try:
        return filelock.lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        _refused(error)
        return None


def share(file: Path) -> None:
    """Mark a file as in use, by any number of processes, until this one ends."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    place = (status.st_dev, status.st_ino)
    if place in _shared:
        os.close(descriptor)
        return
    _shared[place] = descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        _refused(error)


def is_shared(file: Path) -> bool:
    """Whether a process uses a file; True where nobody can tell."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return not lock_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _refused(error: OSError) -> None:
    """Pass on an error, unless it says that the file system has no locks."""
    if error.errno not in _NO_LOCKS:
        raise error
    _warn_once(error.strerror)


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning(
        "a file system in use here has no locks (%s): nothing keeps a second run out of the same "
        "output_dir, so start only one at a time there",
        reason,
    )
