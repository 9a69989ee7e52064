"""Run programs a model wrote, each in a bubblewrap sandbox of its own, and judge them from outside.

Inside there are the system's read-only /usr and Python's standard library, a small /tmp in
memory, no network, no /proc, no home folder, no environment of ours, and a user that is not root
even where we are. The tests run in a second sandbox (`judge`), which asks the program over
a socket and gets plain values back (`wire`, `remote`): the program never holds a test, an expected
value or the means to tell a verdict. A sandbox guards against accidents and ordinary malice, not
against flaws of the kernel.
"""

from __future__ import annotations

import marshal
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from kpsvd_tune.errors import InputError, ResourceError
from kpsvd_tune.evaluation.sandbox.bubblewrap import (
    ENVIRONMENT,
    bubblewrap_command,
    find_bubblewrap,
    is_root,
    memory_file,
    open_filter,
)
from kpsvd_tune.evaluation.sandbox.capture import Capture, Limits, Stop, capture_run
from kpsvd_tune.storage.memory import free_memory

Sandbox = Literal["bwrap", "none"]
Status = Literal["passed", "failed", "invalid", "crashed"] | Stop
_FAULTS = ("failed", "invalid", "crashed")

_INSTALL = (
    "Install bubblewrap 0.8 or newer (Debian, Ubuntu: sudo apt-get install bubblewrap; Fedora: "
    "sudo dnf install bubblewrap), or type --sandbox none to run the code without protection."
)


@dataclass(frozen=True)
class Program:
    """A program and the tests it must pass, which see its names as if they stood behind it."""

    source: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class RunResult:
    """How a program went.

    "failed": an assert or another error; "invalid": it does not compile; "output", "memory",
    "files": it used more than it may; "crashed": it ended before its tests did.
    """

    status: Status
    detail: str = ""  # the error, as the judge tells it
    output: str = ""  # the beginning of what it printed

    @property
    def passed(self) -> bool:
        """Whether all tests held."""
        return self.status == "passed"


def check_sandbox(sandbox: str) -> None:
    """Refuse a sandbox that is not "none" or a working "bwrap"; the message says how to get one."""
    if sandbox not in ("bwrap", "none"):
        raise InputError(f"--sandbox must be bwrap or none, got {sandbox!r}.")
    if sandbox == "bwrap" and (fault := sandbox_fault()):
        raise InputError(f"{fault} {_INSTALL}")


def run_programs(
    programs: Sequence[Program],
    *,
    sandbox: Sandbox = "bwrap",
    limits: Limits | None = None,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RunResult]:
    """Run many programs, several at a time, and give their results in their order.

    By default as many run at once as there are processors, and memory for if each uses all it may.
    `progress` is told (done, total) after each. ResourceError: a sandbox did not start.
    """
    check_sandbox(sandbox)
    limits = limits or Limits()
    results = []
    with ThreadPoolExecutor(num_workers or _num_workers(limits)) as workers:
        for result in workers.map(lambda each: run_program(each, sandbox, limits), programs):
            results.append(result)
            if progress is not None:
                progress(len(results), len(programs))
    return results


def run_program(
    program: Program, sandbox: Sandbox = "bwrap", limits: Limits | None = None
) -> RunResult:
    """Run one program, leaving nothing of it; ResourceError where the sandbox did not start."""
    limits = limits or Limits()
    with ExitStack() as stack:
        end, other_end = map(stack.enter_context, socket.socketpair())
        scratch, sender = map(stack.enter_context, socket.socketpair())
        tried, judge = (
            stack.enter_context(_started(module, content, passed, sender, sandbox, limits))
            for module, content, passed in (
                ("program", {"program": program.source}, end),
                ("judge", {"tests": list(program.tests)}, other_end),
            )
        )
        capture = capture_run(tried, judge, limits, scratch)
    return _result(capture, sandbox)


@contextmanager
def _started(
    module: str,
    content: dict[str, Any],
    end: socket.socket,
    scratch: socket.socket,
    sandbox: Sandbox,
    limits: Limits,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs a module of ours, in a session of its own; nothing of it is left."""
    job = {**content, **_process_limits(limits, sandbox), "socket": end.fileno(), "scratch": None}
    with ExitStack() as stack:
        wrapper: list[str] = []
        own_scratch = stack.enter_context(scratch.dup())
        passed: list[BinaryIO | socket.socket] = [end, own_scratch]
        if sandbox == "bwrap":
            folder = "/"  # bubblewrap takes another one
            job["scratch"] = own_scratch.fileno()
            syscalls = open_filter()
            if syscalls is not None:
                passed.append(stack.enter_context(syscalls))
            bubblewrap = find_bubblewrap() or "bwrap"
            wrapper = bubblewrap_command(bubblewrap, limits.scratch_bytes, syscalls)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kpsvd-tune-"))
        with memory_file(marshal.dumps((_code_for(module), job))) as standard_input:
            process = subprocess.Popen(
                [*wrapper, *_interpreter()],
                stdin=standard_input,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if module == "judge" else subprocess.STDOUT,
                cwd=folder,
                env=ENVIRONMENT,
                start_new_session=True,
                pass_fds=[each.fileno() for each in passed],
            )
        for each in passed:  # so that each side of a connection notices the end of the other
            each.close()
        try:
            yield process
        finally:
            # Killing bubblewrap ends its process namespace, and with it all that started there.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Not read to their ends: without a sandbox a child left behind may hold them open.
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
            process.wait()


def _process_limits(limits: Limits, sandbox: Sandbox) -> dict[str, Any]:
    # A user of its own each time: the limit on processes counts all that a user runs.
    uid = 0x60000000 + secrets.randbelow(2**24) if sandbox == "bwrap" and is_root() else None
    num_processes = limits.num_processes
    if not is_root() and (sandbox == "none" or _kernel_version() < (5, 14)):
        # All that we run already, and what may be started beside this program, count too. Since
        # Linux 5.14 a user namespace counts its own processes alone.
        num_processes = _num_own_threads() + num_processes * (os.cpu_count() or 1)
    return {
        "uid": uid,
        "limits": {
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_NPROC": num_processes,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_SIGPENDING": 64,
            "RLIMIT_MSGQUEUE": 0,
        },
    }


def _kernel_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])


def _num_own_threads() -> int:
    """Threads of all processes that this user runs."""
    count = 0
    for process in os.scandir("/proc"):
        with suppress(OSError):  # it has just ended
            if process.name.isdecimal() and process.stat().st_uid == os.getuid():
                count += len(os.listdir(f"{process.path}/task"))
    return count


def _num_workers(limits: Limits) -> int:
    """Programs at a time: one for each processor, as far as there is memory if each uses all."""
    processors = os.cpu_count() or 1
    free = free_memory()
    return processors if free is None else max(1, min(processors, free // limits.total_bytes))


def _result(capture: Capture, sandbox: Sandbox) -> RunResult:
    output = capture.output.decode("utf-8", "replace")
    told = capture.verdict.decode("utf-8", "replace").splitlines()
    if not told:
        if capture.stopped is not None:
            return RunResult(capture.stopped, "before the program started", output)
        # Program and judge say the same where neither starts.
        words = " ".join(dict.fromkeys(output.splitlines()))
        raise ResourceError(
            f"the {'sandbox' if sandbox == 'bwrap' else 'interpreter'} did not start: "
            f"{words.strip()[:300] or 'no message'}. Nothing was scored; free memory or "
            "processes and run the same command again."
        )
    status, _, detail = told[-1].partition(" ")
    if status == "passed":
        return RunResult("passed", "", output)
    if capture.stopped is not None:
        return RunResult(capture.stopped, "", output)
    if status in _FAULTS:
        return RunResult(cast(Status, status), detail, output)
    return RunResult("crashed", "its judge ended before the tests did", output)


# A bare Python reads its parts from standard input: no site packages, nothing from the current
# folder, no environment. The last part is the one to run.
_BOOTSTRAP = """
import marshal, sys, types
parts, job = marshal.loads(sys.stdin.buffer.read())
for name, code in marshal.loads(parts):
    module = sys.modules[name] = types.ModuleType(name)
    exec(code, module.__dict__)
module.main(job)
"""


def _interpreter() -> list[str]:
    binary = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return [binary, "-s", "-S", "-B", "-P", "-u", "-c", _BOOTSTRAP]


@cache
def _code_for(module: str) -> bytes:
    """A module of ours and those it imports, in the order they need each other."""
    parts = []
    for name in ("wire", "remote", "limits", module):
        text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        parts.append((f"{__package__}.{name}", compile(text, f"<{name}>", "exec")))
    return marshal.dumps(tuple(parts))


@cache
def sandbox_fault() -> str | None:
    """What stands in the way of a sandbox, found by starting one; None where nothing does."""
    if find_bubblewrap() is None:
        return "Generated code runs in bubblewrap, which is not installed: found no bwrap."
    try:
        result = run_program(Program("", ()), "bwrap", Limits())
    except ResourceError as error:
        return f"bubblewrap cannot be used on this machine: {error}"
    return None if result.passed else f"bubblewrap cannot be used on this machine: {result}."
