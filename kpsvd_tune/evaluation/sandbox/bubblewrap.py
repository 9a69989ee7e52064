"""The command that starts a program in bubblewrap: what it sees and what it may do.

Namespaces and resource limits leave gaps: a new user namespace may mount memory without limit,
shared memory and anonymous files count for no process. So a seccomp filter refuses the system
calls that get round the limits. No program that answers a programming task needs these calls;
everything else is allowed, so that ordinary programs run unchanged.

Source: the kernel's `Documentation/userspace-api/seccomp_filter.rst`, and the system call tables
of the two architectures.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
import struct
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import BinaryIO

# A fixed hash seed: the order of a set must not decide whether a program passes.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}

_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# Calls to refuse, as (x86_64, aarch64) numbers.
_REFUSED: Mapping[str, tuple[int, int]] = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "fsopen": (430, 430),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
# A socket of any other family may lead out of an empty network namespace: to the machine that
# hosts this one (AF_VSOCK), to hardware, to the kernel's own interfaces.
_SOCKET_CALLS = ((41, 198), (53, 199))  # socket, socketpair
_SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_CLONE = (56, 220)
_CLONE3 = 435
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_NEW_NAMESPACE_FLAGS = 0x7E020000
_FIRST_X32_CALL = 0x40000000

# Instructions of the filter language: (code, jump if true, jump if false, operand).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


def is_root() -> bool:
    """Whether this process is root, so that the program needs another user id."""
    return os.geteuid() == 0


def find_bubblewrap() -> str | None:
    """The full path of bubblewrap, None where it is not installed.

    Folders of PATH that are relative or writable by all are skipped: others could plant a file.
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
    """The words to put before a command, with /tmp as the only place that can be written to.

    `syscalls` is what `open_filter` gave; it must be passed on to the process.
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
    # Before the folders, so that /tmp does not hide a Python that is installed below it.
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


def syscall_filter(machine: str) -> bytes | None:
    """The filter as `bwrap --seccomp` reads it; None where its call numbers are unknown."""
    if machine not in _ARCHITECTURES:
        return None
    architecture, column = _ARCHITECTURES[machine]
    no = (_RETURN, 0, 0, _REFUSE | errno.EPERM)
    # Not implemented: the C library then falls back to clone, whose flags can be looked at.
    missing = (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)
    program = [(_LOAD, 0, 0, _ARCHITECTURE_AT), (_EQUAL, 1, 0, architecture), no]
    program += [(_LOAD, 0, 0, _NUMBER_AT), (_AT_LEAST, 0, 1, _FIRST_X32_CALL), no]
    for numbers in _REFUSED.values():
        program += [(_EQUAL, 0, 1, numbers[column]), no]
    program += [(_EQUAL, 0, 1, _CLONE3), missing]
    for numbers in _SOCKET_CALLS:
        program += [(_EQUAL, 0, 6, numbers[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT)]
        left = len(_SOCKET_FAMILIES)
        for family in _SOCKET_FAMILIES:
            program += [(_EQUAL, left, 0, family)]
            left -= 1
        program += [(_RETURN, 0, 0, _REFUSE | errno.EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT)]
    program += [(_ANY_BIT, 0, 1, _NEW_NAMESPACE_FLAGS), no]
    program += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
