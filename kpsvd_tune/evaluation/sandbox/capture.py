"""Run a program and its judge with a deadline and limits; nothing of them is left behind."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from kpsvd_tune.evaluation.sandbox.bubblewrap import ENVIRONMENT, memory_file
from kpsvd_tune.evaluation.sandbox.usage import Usage

_LOOK_SECONDS = 0.02
Stop = Literal["timeout", "output", "memory", "files"]


@dataclass(frozen=True)
class Start:
    """What to start.

    Attributes:
        command: its words.
        folder: where it is started.
        job: its standard input.
        passed: open files to pass on; closed here once it has them, so that each side of a
            connection notices the end of the other.
    """

    command: list[str]
    folder: str
    job: bytes
    passed: tuple[BinaryIO | socket.socket, ...]


@dataclass(frozen=True)
class Bounds:
    """What a program and its judge may use together; `Limits` describes each."""

    cpu_seconds: int
    wall_seconds: float
    output_bytes: int
    total_bytes: int
    num_files: int


@dataclass
class Capture:
    """What came out of one run.

    Attributes:
        verdict: what the judge wrote to standard output.
        output: what the program wrote, and the judge to standard error.
        stopped: why it was ended; None where the judge came to an end.
        exit_code: how the program ended, minus the signal's number where one ended it; None where
            it was still running.
        cpu_seconds: the most processor time seen of any one process of the program.
    """

    verdict: bytearray = field(default_factory=bytearray)
    output: bytearray = field(default_factory=bytearray)
    stopped: Stop | None = None
    exit_code: int | None = None
    cpu_seconds: float = 0.0


def capture_run(
    program: Start, judge: Start, bounds: Bounds, scratch: Sequence[socket.socket]
) -> Capture:
    """Run a program and its judge, each in a session of its own.

    Args:
        program: starts the program under test.
        judge: starts its judge.
        bounds: what they may use.
        scratch: what each sends its /tmp over; see `Usage`.
    """
    capture = Capture()
    with ExitStack() as stack:
        tried = stack.enter_context(_started(program, subprocess.STDOUT))
        judging = stack.enter_context(_started(judge, subprocess.PIPE))
        usage = Usage((tried.pid, judging.pid), scratch)
        stack.callback(usage.close)
        capture.stopped = _collect(tried, judging, capture, usage, bounds)
        capture.exit_code = _exit_code(tried, wait=b"\ncrashed " in capture.verdict)
        judge_exit_code = _exit_code(judging, wait=False)
        capture.cpu_seconds = usage.cpu_seconds
    overran = capture.exit_code == -signal.SIGKILL and capture.cpu_seconds >= bounds.cpu_seconds
    # The judge overruns too, where what the program returns has no end.
    warned = -signal.SIGXCPU in (capture.exit_code, judge_exit_code)
    if capture.stopped is None and (overran or warned):
        capture.stopped = "timeout"
    return capture


@contextmanager
def _started(start: Start, errors: int) -> Iterator[subprocess.Popen[bytes]]:
    with memory_file(start.job) as file:
        process = subprocess.Popen(
            start.command,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=start.folder,
            env=ENVIRONMENT,
            start_new_session=True,
            pass_fds=[each.fileno() for each in start.passed],
        )
    for each in start.passed:
        each.close()
    try:
        yield process
    finally:
        # Killing bubblewrap ends its process namespace, and with it all that was started there.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # Not read to their ends: without a sandbox a child left behind may hold them open.
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        process.wait()


def _collect(
    tried: subprocess.Popen[bytes],
    judging: subprocess.Popen[bytes],
    capture: Capture,
    usage: Usage,
    bounds: Bounds,
) -> Stop | None:
    """Read verdict and output until the judge ends, a limit is broken or time is up."""
    deadline = time.monotonic() + bounds.wall_seconds
    next_look = 0.0
    with selectors.DefaultSelector() as selector:
        streams = ((judging.stdout, capture.verdict), (judging.stderr, capture.output))
        for stream, sink in (*streams, (tried.stdout, capture.output)):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, sink)
        while True:
            # Asked before reading: what was written before the end is then still read. The second
            # line of the verdict is the last.
            has_ended = capture.verdict.count(b"\n") > 1 or judging.poll() is not None
            now = time.monotonic()
            if now >= deadline and not has_ended:
                return "timeout"
            if now >= next_look and not has_ended:
                if (broken := _broken_limit(usage, bounds)) is not None:
                    return broken
                next_look = now + _LOOK_SECONDS
            events = selector.select(0 if has_ended else min(deadline - now, _LOOK_SECONDS))
            if has_ended and not events:
                return None
            for key, _ in events:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk[: bounds.output_bytes - len(key.data)])
                if len(key.data) >= bounds.output_bytes:
                    return "output"


def _broken_limit(usage: Usage, bounds: Bounds) -> Stop | None:
    usage.look()
    if usage.num_files > bounds.num_files:
        return "files"
    if usage.memory_bytes <= bounds.total_bytes:
        return None
    # A look counts pages that processes share more than once; and of a process that forks while
    # shares are counted, a part is counted twice: what holds a moment later too is true.
    for _ in range(2):
        if usage.shared_memory_bytes() <= bounds.total_bytes:
            return None
        time.sleep(0.005)
    return "memory"


def _exit_code(process: subprocess.Popen[bytes], *, wait: bool) -> int | None:
    """How a process ended; after a crash it may be a moment until that is known."""
    with suppress(subprocess.TimeoutExpired):
        code = process.wait(1.0 if wait else 0)
        # 128 + the signal is how bubblewrap passes on what ended its program.
        return 128 - code if code > 128 else code
    return None
