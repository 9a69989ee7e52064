"""A seccomp filter for the sandbox: the system calls that would get round its limits are refused.

Namespaces and resource limits leave gaps: a new user namespace may mount memory without bound,
shared memory and anonymous files count against no process. No program that answers a programming
task needs these calls. Everything else is allowed, so that ordinary programs run as ever.

Source: the kernel's `Documentation/userspace-api/seccomp_filter.rst`, and the system call tables
of the two architectures.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping

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


def syscall_filter(machine: str) -> bytes | None:
    """The filter as `bwrap --seccomp` reads it.

    Args:
        machine: the architecture, as `platform.machine()` names it.

    Returns:
        The program, or None for an architecture whose call numbers we do not hold.
    """
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
