"""The filter of system calls, run by a small machine of our own."""

from __future__ import annotations

import errno
import struct

import pytest

from kpsvd_tune.evaluation.sandbox.bubblewrap import syscall_filter

ALLOW = 0x7FFF0000
PERMISSION = 0x00050000 | errno.EPERM
MISSING = 0x00050000 | errno.ENOSYS
NEW_USER, VM_AND_THREAD = 0x10000000, 0x00010F00
# (architecture word, unshare, mount, memfd_create, clone, read, write, execve)
X86 = (0xC000003E, 272, 165, 319, 56, 0, 1, 59)
ARM = (0xC00000B7, 97, 40, 279, 220, 63, 64, 221)
MACHINES = [("x86_64", *X86), ("aarch64", *ARM)]


def run(program: bytes, architecture: int, number: int, first_argument: int = 0) -> int:
    """What the kernel would return: load, jump and return are all the filter uses."""
    data = struct.pack("=IIQQ", number, architecture, 0, first_argument)
    instructions = list(struct.iter_unpack("=HBBI", program))
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        if code == 0x06:
            return int(operand)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, operand)
            continue
        holds = {
            0x15: accumulator == operand,
            0x35: accumulator >= operand,
            0x45: bool(accumulator & operand),
        }[code]
        at += if_true if holds else if_false


@pytest.mark.parametrize("machine", MACHINES, ids=["x86_64", "aarch64"])
def test_calls_that_get_round_the_limits_are_refused(
    machine: tuple[str, int, int, int, int, int, int, int, int],
):
    name, architecture, unshare, mount, memfd, clone, *ordinary = machine
    program = syscall_filter(name)
    assert program is not None
    for number in (unshare, mount, memfd):
        assert run(program, architecture, number) == PERMISSION
    for number in ordinary:
        assert run(program, architecture, number) == ALLOW
    assert run(program, architecture, clone, VM_AND_THREAD) == ALLOW
    assert run(program, architecture, clone, NEW_USER | VM_AND_THREAD) == PERMISSION
    assert run(program, architecture, 435) == MISSING


@pytest.mark.parametrize(
    ("name", "architecture", "calls"),
    [
        ("x86_64", X86[0], (41, 53)),
        ("aarch64", ARM[0], (198, 199)),
    ],
)
def test_sockets_of_other_families_are_refused(
    name: str, architecture: int, calls: tuple[int, int]
):
    program = syscall_filter(name)
    assert program is not None
    for call in calls:
        allowed = {f for f in range(64) if run(program, architecture, call, f) == ALLOW}
        assert allowed == {1, 2, 10}
        # The kernel looks at the lower half of the argument alone.
        assert run(program, architecture, call, 2**32 + 40) == 0x00050000 | errno.EAFNOSUPPORT


def test_other_architectures_do_not_slip_through():
    program = syscall_filter("x86_64")
    assert program is not None
    assert run(program, 0x40000003, 4) == PERMISSION  # the 32-bit call table
    assert run(program, X86[0], 0x40000000 + 1) == PERMISSION  # the x32 call table


def test_an_unknown_machine_has_no_filter():
    assert syscall_filter("riscv64") is None
