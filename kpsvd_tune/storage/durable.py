"""Disk operations that survive a crash, and that say what failed where.

Everything the save path does to a disk goes through `os` in this module and nowhere else, so a test
can enumerate every write, fsync, rename and delete, and fail or kill at each of them.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import InputError
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.paths import kind_of, named

# One write call moves at most 2 GiB on Linux; a smaller piece keeps its size out of every limit.
_PIECE_BYTES = 1 << 28


def write_file(path: Path, data: bytes) -> None:
    """Write a file anew and wait until it is on the disk.

    Raises:
        ResourceError: The disk refused; the message holds the path and the size.
    """
    with explained(f"write {len(data):,} bytes to {path}"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` new content; a crash leaves the old content or the new, never a mixture.

    Raises:
        ResourceError: The disk refused; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    write_file(temporary, data)
    rename(temporary, path)


def append_file(path: Path, data: bytes) -> None:
    """Append to a file, which is made if need be; `sync_file` makes it last.

    Raises:
        ResourceError: The disk refused.
    """
    with explained(f"append {len(data):,} bytes to {path}"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> int:
    """Wait until an appended file is on the disk.

    Returns:
        Its size in bytes, 0 where there is no such file.
    """
    with explained(f"save {path}"):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            os.fsync(descriptor)
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)


def truncate_file(path: Path, num_bytes: int) -> None:
    """Cut a file to `num_bytes`; a shorter or missing one stays as it is."""
    with explained(f"cut {path} to {num_bytes:,} bytes"):
        if path.exists() and path.stat().st_size > num_bytes:
            os.truncate(path, num_bytes)
            sync_file(path)


def rename(source: Path, target: Path) -> None:
    """Rename within one file system and wait until the new name is on the disk."""
    with explained(f"rename {source} to {target}"):
        os.replace(source, target)
        sync_folder(target.parent)
        if source.parent != target.parent:
            sync_folder(source.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents; one that is there is fine."""
    with explained(f"make the folder {path}"):
        if not path.is_dir():
            os.makedirs(path, exist_ok=True)
            sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder; its name goes first, so a crash never leaves half of it under its name."""
    doomed = path.with_name(f".removed-{path.name.lstrip('.')}")
    with explained(f"delete {path}"):
        if path != doomed:
            if doomed.exists():
                _remove_tree(doomed)
            os.replace(path, doomed)
        _remove_tree(doomed)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder and say so; they sync names by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Find out before long work whether a folder can be made and written; nothing is left behind.

    Raises:
        InputError: It cannot; the message says why, and to name another folder.
    """
    place = folder.absolute()
    try:
        while not _lies_there(place):
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder} cannot be written: {reason} ({place}); name another folder"
        ) from error


def check_replaceable(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder where something other than a file bears a name that is to be written.

    Raises:
        InputError: A folder, a pipe or a device is in the way.
    """
    for name in names:
        kind = kind_of(folder / name)
        if kind is not None and not os.path.isfile(folder / name):
            raise InputError(
                f"{folder / name} is {named(kind)}, and a file is to be written there; remove it, "
                "or name another folder"
            )


def _lies_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def to_json(value: Any) -> bytes:
    """Serialise; floats come back as the same floats, NaN and infinity are refused."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest[:_PIECE_BYTES]) :]


def _remove_tree(path: Path) -> None:
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            _remove_tree(entry)
        else:
            os.unlink(entry)
    os.rmdir(path)
