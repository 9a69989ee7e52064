"""Run programs a model wrote, each in a bubblewrap sandbox of its own.

Inside there are the system's read-only /usr and Python's standard library, a small /tmp in
memory, no network, no /proc, no home folder, no environment of ours, and a user that is not root
even where we are. A program counts as passed only when the runner inside sends back a random word
made for this one run; the word is not in the program's reach by ordinary means.

Known limits: a program that searches the interpreter's memory can find that word, and an object
that is equal to everything passes any assert. A sandbox guards against accidents and ordinary
malice, not against flaws of the kernel.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from kpsvd_tune.errors import InputError, ResourceError
from kpsvd_tune.evaluation.bubblewrap import bubblewrap_command, filter_file, is_root
from kpsvd_tune.evaluation.capture import Capture, capture_run

Sandbox = Literal["bwrap", "none"]
Status = Literal["passed", "failed", "invalid", "timeout", "output", "crashed"]

_INSTALL = (
    "Install bubblewrap 0.8 or newer (Debian, Ubuntu: sudo apt-get install bubblewrap; Fedora: "
    "sudo dnf install bubblewrap), or type --sandbox none to run the code without protection."
)
_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Program:
    """A program and the tests it must pass, each run in the program's own namespace."""

    source: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        cpu_seconds: processor time of each process; a busy machine does not use it up.
        wall_seconds: time from start to end.
        memory_bytes: address space of each process, so that all together can hold
            `memory_bytes` * `num_processes` + `scratch_bytes` at most.
        num_processes: processes and threads.
        file_bytes: size of each file.
        scratch_bytes: size of /tmp.
        output_bytes: what it may print.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 40.0
    memory_bytes: int = 512 * _MEBIBYTE
    num_processes: int = 8
    file_bytes: int = 16 * _MEBIBYTE
    scratch_bytes: int = 64 * _MEBIBYTE
    output_bytes: int = _MEBIBYTE


@dataclass(frozen=True)
class RunResult:
    """How a program went.

    Attributes:
        status: "passed"; "failed": an assert or another error; "invalid": it does not compile;
            "timeout"; "output": it wrote more than it may; "crashed": it ended without a verdict.
        detail: the error, as the program's side tells it.
        output: the beginning of what it printed.
    """

    status: Status
    detail: str = ""
    output: str = ""

    @property
    def passed(self) -> bool:
        """Whether all tests held."""
        return self.status == "passed"


def sandbox_available() -> bool:
    """Whether bubblewrap is installed and may start a sandbox on this machine."""
    return _sandbox_fault() is None


def check_sandbox(sandbox: str) -> None:
    """Make sure that programs can be run as asked, before any work is done for it.

    Args:
        sandbox: "bwrap", or "none" to run programs with the user's own rights.

    Raises:
        InputError: another word than these, or bubblewrap is missing, too old or forbidden here;
            the message says how to install it.
    """
    if sandbox not in ("bwrap", "none"):
        raise InputError(f"--sandbox must be bwrap or none, got {sandbox!r}.")
    if sandbox == "bwrap" and (fault := _sandbox_fault()):
        raise InputError(f"{fault} {_INSTALL}")


def run_programs(
    programs: Sequence[Program],
    *,
    sandbox: Sandbox = "bwrap",
    limits: Limits | None = None,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RunResult]:
    """Run many programs, several at a time.

    Args:
        programs: what to run; nothing is shared between them.
        sandbox: "bwrap", or "none" for no protection but the limits.
        limits: what each program may use.
        num_workers: programs at a time; the number of processors by default.
        progress: called with (done, total) after each program.

    Returns:
        One result a program, in their order.

    Raises:
        InputError: the sandbox cannot be had (see `check_sandbox`).
        ResourceError: a sandbox did not start.
    """
    check_sandbox(sandbox)
    limits = limits or Limits()
    results = []
    with ThreadPoolExecutor(num_workers or os.cpu_count() or 1) as workers:
        runs = [workers.submit(run_program, job, sandbox, limits) for job in programs]
        try:
            for run in runs:
                results.append(run.result())
                if progress is not None:
                    progress(len(results), len(runs))
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    return results


def run_program(
    program: Program, sandbox: Sandbox = "bwrap", limits: Limits | None = None
) -> RunResult:
    """Run one program; nothing of it is left when the call returns.

    Raises:
        ResourceError: the sandbox did not start.
    """
    limits = limits or Limits()
    nonce = secrets.token_hex(16)
    # A user of its own each time: the limit on processes counts all that a user runs.
    uid = 0x60000000 + secrets.randbelow(2**24) if sandbox == "bwrap" and is_root() else None
    job = {
        "program": program.source,
        "tests": list(program.tests),
        "nonce": nonce,
        "uid": uid,
        "limits": {
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_NPROC": limits.num_processes,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        },
    }
    with ExitStack() as stack:
        command = _interpreter()
        descriptors: tuple[int, ...] = ()
        if sandbox == "bwrap":
            descriptors = stack.enter_context(filter_file())
            command = [*bubblewrap_command(limits.scratch_bytes, descriptors), *command]
        capture = capture_run(
            command,
            json.dumps(job).encode(),
            wall_seconds=limits.wall_seconds,
            output_bytes=limits.output_bytes,
            descriptors=descriptors,
        )
    return _judge(capture, nonce, sandbox)


def _judge(capture: Capture, nonce: str, sandbox: Sandbox) -> RunResult:
    output = capture.output.decode("utf-8", "replace")
    lines = capture.verdict.decode("utf-8", "replace").split("\n")
    told = [line.removeprefix(f"{nonce} ") for line in lines if line.startswith(f"{nonce} ")]
    if not told:
        if capture.stopped is not None:
            return RunResult(capture.stopped, "before the program started", output)
        raise ResourceError(
            f"the {'sandbox' if sandbox == 'bwrap' else 'interpreter'} did not start: "
            f"{output.strip()[:300] or 'no message'}. Nothing was scored; free memory or "
            "processes and run the same command again."
        )
    if capture.stopped is not None:
        return RunResult(capture.stopped, "", output)
    status, _, detail = told[-1].partition(" ")
    if status == "passed":
        return RunResult("passed", "", output)
    if status == "failed":
        return RunResult("failed", detail, output)
    if status == "invalid":
        return RunResult("invalid", detail, output)
    return RunResult("crashed", "it ended before its tests did", output)


def _interpreter() -> list[str]:
    """A bare Python: no site packages, nothing from the current folder, no environment."""
    binary = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    runner = Path(__file__).with_name("sandbox_program.py").read_text(encoding="utf-8")
    return [binary, "-s", "-S", "-B", "-P", "-u", "-c", runner]


@cache
def _sandbox_fault() -> str | None:
    """What stands in the way of a sandbox, found by starting one; None where nothing does."""
    if shutil.which("bwrap") is None:
        return "Generated code runs in bubblewrap, which is not installed: found no bwrap."
    try:
        result = run_program(Program("", ()), "bwrap", Limits())
    except ResourceError as error:
        return f"bubblewrap cannot be used on this machine: {error}"
    return None if result.passed else f"bubblewrap cannot be used on this machine: {result}."
