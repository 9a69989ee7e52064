"""The command that starts a program in bubblewrap: what it sees and what it may do."""

from __future__ import annotations

import os
import platform
import stat
import sys
from functools import cache
from pathlib import Path
from typing import BinaryIO

from kpsvd_tune.evaluation.sandbox.syscall_filter import syscall_filter

# A fixed hash seed: the order of a set must not decide whether a program passes.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}

_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def is_root() -> bool:
    """Whether this process has all rights, so that the program must be made somebody else."""
    return os.geteuid() == 0


def find_bubblewrap() -> str | None:
    """The full path of bubblewrap, None where it is not installed.

    Folders of PATH that are relative, or into which everybody may write, are passed over: whoever
    can put a file there would run it with our rights.
    """
    for folder in os.get_exec_path():
        file = Path(folder, "bwrap")
        if not file.is_absolute() or not os.access(file, os.X_OK) or not file.is_file():
            continue
        real = file.resolve()
        parts = (file.parent, real.parent, real)
        if not any(part.stat().st_mode & stat.S_IWOTH for part in parts):
            return str(real)
    return None


def bubblewrap_command(program: str, scratch_bytes: int, syscalls: BinaryIO | None) -> list[str]:
    """The words to put before a command.

    Args:
        program: bubblewrap's own file, as `find_bubblewrap` gives it.
        scratch_bytes: size of /tmp, the only place that can be written to.
        syscalls: what `open_filter` gave; must be passed on to the process.
    """
    command = [program, "--die-with-parent", "--new-session", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
    if is_root():
        # No user namespace: inside it we would still count as root, whom no process limit binds.
        # The runner gives these two rights up when it becomes somebody else.
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns"]
    if syscalls is not None:
        command += ["--seccomp", str(syscalls.fileno())]
    # First of all, so that a Python that lies below /tmp itself is not hidden by it.
    command += ["--perms", "1777", "--size", str(scratch_bytes), "--tmpfs", "/tmp"]
    command += _readable_folders()
    command += ["--dir", "/dev"]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    # Semaphores and shared memory of multiprocessing, under the same limits as files.
    command += ["--symlink", "/tmp", "/dev/shm"]
    return [*command, "--chdir", "/tmp", "--remount-ro", "/", "--"]


def open_filter() -> BinaryIO | None:
    """The filter of system calls as an open file, or None where there is none."""
    content = syscall_filter(platform.machine())
    return None if content is None else memory_file(content)


def memory_file(content: bytes) -> BinaryIO:
    """An open file in memory, to be read from its beginning."""
    file = os.fdopen(os.memfd_create("kpsvd-tune"), "w+b")
    file.write(content)
    file.seek(0)
    return file


@cache
def _readable_folders() -> tuple[str, ...]:
    """The system's programs and libraries, and Python's own folder where it lies elsewhere."""
    prefix = os.path.realpath(sys.base_prefix)
    is_system = Path(prefix).is_relative_to("/usr")
    words: list[str] = []
    for folder in _SYSTEM_FOLDERS if is_system else (*_SYSTEM_FOLDERS, prefix):
        # Made by hand, because bubblewrap's own parent folders are closed to all but root.
        for parent in reversed(Path(folder).parents[:-1]):
            words += ["--dir", str(parent)]
        words += ["--ro-bind-try", folder, folder]
    return tuple(words)
