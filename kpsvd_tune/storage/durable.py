"""Files and folders written so that a crash at any moment leaves the old content or the new.

Everything that is written, synced, renamed or deleted goes through `os` in this module and nowhere
else, so a test can enumerate every operation, and fail or kill at each of them. What a disk refuses
is a ResourceError that names the path.

What will be called NAME is written aside as `.NAME.XXXXXXXX.tmp`, with X random, then synced and
renamed. Its writer holds a lock on it meanwhile. So the next writer of NAME can tell what a killed
process left from what another one is writing, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

# collections.abc has it from Python 3.12 on.
from typing_extensions import Buffer

from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.locks import lock_descriptor

# Why a file system does not copy inside the kernel; the bytes are then read and written.
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EBADF)
# Of a copy through this process's memory.
_COPIED_BYTES = 1 << 22
# One write call moves at most 2 GiB on Linux; a smaller piece keeps its size out of every limit.
_PIECE_BYTES = 1 << 28
_ANEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_RANDOM = "[0-9a-f]" * 8


def replace_file(path: Path, data: bytes) -> None:
    """Give `path`, in a folder that exists, new content; a crash leaves the old or the new.

    ResourceError: the disk refused; the old content stays.
    """
    with explained(f"write {len(data):,} bytes to {path}"), _aside(path, False) as aside:
        temporary, descriptor = aside
        _write_all(descriptor, data)
        os.fsync(descriptor)
        rename(temporary, path)


@contextlib.contextmanager
def write_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a folder to fill, which is called `path` when the block has ended without an error.

    By then all of it is on the disk, and has the modes of the user's other files. `path` is missing
    or an empty folder, or with `replace` a folder that stays until then. ResourceError: the disk
    refused; what was called `path` stays.
    """
    with explained(f"write {path}"):
        path = Path(os.path.realpath(path))  # where a link leads to
        make_folder(path.parent)
        with _aside(path, True) as (temporary, _):
            yield temporary
            _settle(temporary)
            before = _put_away(path) if replace and path.is_dir() else None
            rename(temporary, path)
            if before is not None:
                _remove_tree(before)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file into a folder of :func:`write_folder`, which syncs it."""
    with explained(f"write {len(data):,} bytes to {path}"):
        _write(path, _ANEW, data)


class NewFile:
    """A file that is filled in pieces, in any order and by several threads.

    What the disk refuses is an OSError, which :func:`write_folder` puts into words.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write_at(self, begin: int, data: Buffer) -> None:
        """Write bytes from `begin` on."""
        rest = memoryview(data).cast("B")
        while rest:
            count = os.pwrite(self._descriptor, rest[:_PIECE_BYTES], begin)
            rest, begin = rest[count:], begin + count

    def copy_from(self, source: Path, begin: int, end: int, to: int) -> None:
        """Copy the bytes `begin` to `end` of a file to `to`, inside the kernel where it can."""
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while begin < end:
                count = self._copy(descriptor, begin, end - begin, to)
                if count == 0:
                    raise OSError(errno.EIO, "a file became shorter meanwhile", str(source))
                begin, to = begin + count, to + count
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._descriptor)

    def _copy(self, source: int, begin: int, count: int, to: int) -> int:
        if hasattr(os, "copy_file_range"):
            try:
                most = min(count, _PIECE_BYTES)
                return os.copy_file_range(source, self._descriptor, most, begin, to)
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise
        data = os.pread(source, min(count, _COPIED_BYTES), begin)
        self.write_at(to, data)
        return len(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """Make a file in a folder of :func:`write_folder`, to be filled inside the block."""
    descriptor = os.open(path, _ANEW, 0o666)
    try:
        yield NewFile(descriptor)
    finally:
        os.close(descriptor)


def append_file(path: Path, data: bytes) -> None:
    """Append to a file, which is made if need be; `sync_file` makes it last."""
    with explained(f"append {len(data):,} bytes to {path}"):
        _write(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, data)


def sync_file(path: Path) -> int:
    """Wait until an appended file is on the disk; its size in bytes, 0 where there is none."""
    with explained(f"save {path}"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
            missing = [each for each in (path, *path.parents) if not each.is_dir()]
            os.makedirs(path, exist_ok=True)
            for each in missing:
                sync_folder(each.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder; its name goes first, so a crash never leaves half of it under its name."""
    with explained(f"delete {path}"):
        _remove_tree(_put_away(path))


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    try:
        descriptor = os.open(path, _FOLDER)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder and say so; they sync names by themselves.
        # A folder that may be written and not read cannot be opened.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def remove_leftovers(folder: Path, name: str | None = None, *, is_alone: bool = False) -> None:
    """Delete what killed writers left in a folder, of the file or folder `name` or of any.

    `is_alone`: nobody else writes there, as the caller holds a lock; so what is left is deleted
    on file systems without locks too.
    """
    for leftover in folder.glob(f".{'*' if name is None else glob.escape(name)}.{_RANDOM}.tmp"):
        # What another user left is not ours to delete.
        with contextlib.suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if lock_descriptor(descriptor) or is_alone:
                    _remove_tree(leftover)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _aside(path: Path, is_folder: bool) -> Iterator[tuple[Path, int]]:
    """A new file or folder beside `path` and its descriptor; removed unless it was renamed."""
    remove_leftovers(path.parent, path.name)
    temporary, descriptor = _claim(path, is_folder)
    try:
        yield temporary, descriptor
    except BaseException:
        with contextlib.suppress(OSError):
            _remove_tree(temporary)
        raise
    finally:
        os.close(descriptor)


def _claim(path: Path, is_folder: bool) -> tuple[Path, int]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if is_folder:
            os.makedirs(temporary)
        descriptor = os.open(temporary, _FOLDER if is_folder else _ANEW, 0o666)
        # Before it was locked, another writer may have removed it as a leftover.
        if lock_descriptor(descriptor) is not False and temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def _settle(folder: Path) -> None:
    """Sync all in a folder, with the modes that files get by the umask.

    The safetensors library makes files that nobody else may read.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink():
            continue
        now = stat.S_IMODE(path.stat().st_mode)
        usual = (0o777 if path.is_dir() else 0o666) & ~mask
        # Bits are only added: the setgid bit, which passes on the group of the parent, stays.
        if now | usual != now:
            os.chmod(path, now | usual)
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)


def _put_away(path: Path) -> Path:
    """Rename a folder that is to be deleted, and delete what has that name."""
    doomed = path.with_name(f".removed-{path.name.lstrip('.')}")
    if path != doomed:
        if doomed.exists():
            _remove_tree(doomed)
        os.replace(path, doomed)
    return doomed


def _write(path: Path, flags: int, data: bytes) -> None:
    descriptor = os.open(path, flags, 0o666)
    try:
        _write_all(descriptor, data)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest[:_PIECE_BYTES]) :]


def _remove_tree(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        _remove_tree(entry)
    os.rmdir(path)
