"""Watch a program and its judge that run: a deadline, limits, and what comes out of them.

Resource limits hold for each process, and no option of bubblewrap limits the number of files. So
what all processes of a run use together is watched from outside, many times a second.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Literal

_LOOK_SECONDS = 0.02
_MOST_FOLDERS = 2  # of the program and of its judge
_MIB = 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
Stop = Literal["timeout", "output", "memory", "files"]


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    `total_bytes` and `num_files` are looked at fifty times a second, so may be passed for a moment.
    """

    cpu_seconds: int = 10  # of each process; a busy machine does not use it up
    wall_seconds: float = 40.0  # from start to end
    memory_bytes: int = 512 * _MIB  # address space of each process
    # Memory of all its processes and files in /tmp, its judge's included.
    total_bytes: int = 1024 * _MIB
    num_processes: int = 16  # and threads
    file_bytes: int = 16 * _MIB  # of each file
    scratch_bytes: int = 64 * _MIB  # of /tmp
    num_files: int = 10_000  # files and folders in /tmp
    output_bytes: int = _MIB  # what it may print


@dataclass
class Capture:
    """What came out of one run."""

    verdict: bytearray = field(default_factory=bytearray)  # the judge's standard output
    # What the program wrote, and the judge to standard error.
    output: bytearray = field(default_factory=bytearray)
    stopped: Stop | None = None  # None: the judge came to an end


def capture_run(
    tried: subprocess.Popen[bytes],
    judging: subprocess.Popen[bytes],
    limits: Limits,
    scratch: socket.socket,
) -> Capture:
    """What comes out until the judge ends or a limit is broken; for `scratch` see `Usage`."""
    capture = Capture()
    with closing(Usage((tried.pid, judging.pid), scratch)) as usage:
        capture.stopped = _collect(tried, judging, capture, usage, limits)
    exit_code = _exit_code(tried, wait=b"\ncrashed " in capture.verdict)
    judge_exit_code = _exit_code(judging, wait=False)
    overran = exit_code == -signal.SIGKILL and usage.cpu_seconds >= limits.cpu_seconds
    # The judge runs out of time as well, where what the program returns has no end.
    warned = -signal.SIGXCPU in (exit_code, judge_exit_code)
    if capture.stopped is None and (overran or warned):
        capture.stopped = "timeout"
    return capture


def _collect(
    tried: subprocess.Popen[bytes],
    judging: subprocess.Popen[bytes],
    capture: Capture,
    usage: Usage,
    limits: Limits,
) -> Stop | None:
    """Read verdict and output until the judge ends, a limit is broken or time is up."""
    deadline = time.monotonic() + limits.wall_seconds
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
                if (broken := _broken_limit(usage, limits)) is not None:
                    return broken
                next_look = now + _LOOK_SECONDS
            events = selector.select(0 if has_ended else min(deadline - now, _LOOK_SECONDS))
            if has_ended and not events:
                return None
            for key, _ in events:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk[: limits.output_bytes - len(key.data)])
                if len(key.data) >= limits.output_bytes:
                    return "output"


def _broken_limit(usage: Usage, limits: Limits) -> Stop | None:
    usage.look()
    if usage.num_files > limits.num_files:
        return "files"
    if usage.memory_bytes <= limits.total_bytes:
        return None
    # A look counts pages that processes share more than once; and of a process that forks while
    # shares are counted, a part is counted twice: what holds a moment later too is true.
    for _ in range(2):
        if usage.shared_memory_bytes() <= limits.total_bytes:
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


class Usage:
    """Watches processes and all that descend from them; what is used between two looks goes unseen.

    `scratch` is where the /tmp of each comes from, as an open folder that `limits` sends before
    anything foreign runs, so that no right to look into them is needed. Without a sandbox nothing
    comes.
    """

    def __init__(self, pids: Sequence[int], scratch: socket.socket) -> None:
        self.cpu_seconds = 0.0  # the most seen of any one process
        self.memory_bytes = 0  # of all processes and files in /tmp, at the last look
        self.num_files = 0  # files and folders in /tmp, at the last look
        self._pids = pids
        self._scratch = scratch
        scratch.setblocking(False)
        self._folders: list[int] = []

    def look(self) -> None:
        """Bring the attributes up to date."""
        memory = 0
        for pid in _descendants(self._pids):
            with suppress(OSError, ValueError, IndexError):
                # Behind the command's name, which may hold spaces and brackets.
                fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
                self.cpu_seconds = max(
                    self.cpu_seconds, (int(fields[11]) + int(fields[12])) / _TICKS
                )
                memory += int(fields[21]) * _PAGE
        self.memory_bytes = memory + self._scratch_memory_bytes()

    def shared_memory_bytes(self) -> int:
        """Memory with shared pages counted once, or as the last look had it; slower than a look."""
        total = self._scratch_memory_bytes()
        for pid in _descendants(self._pids):
            try:
                text = _read(f"/proc/{pid}/smaps_rollup")
            except PermissionError:
                return self.memory_bytes
            except OSError:
                continue  # it has just ended
            for line in text.splitlines():
                if line.startswith(b"Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def _scratch_memory_bytes(self) -> int:
        """Memory of the files in /tmp; counts them as well."""
        with suppress(BlockingIOError):
            while len(self._folders) < _MOST_FOLDERS and (
                received := socket.recv_fds(self._scratch, 1, 1)[1]
            ):
                self._folders += received
        found = [os.fstatvfs(folder) for folder in self._folders]
        self.num_files = sum(each.f_files - each.f_ffree for each in found)
        return sum((each.f_blocks - each.f_bfree) * each.f_frsize for each in found)

    def close(self) -> None:
        """Let the sandbox's files go."""
        while self._folders:
            os.close(self._folders.pop())


def _descendants(pids: Sequence[int]) -> list[int]:
    found = [*pids]
    for each in found:
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{each}/task"):
                with suppress(OSError):
                    text = _read(f"/proc/{each}/task/{thread}/children")
                    found += [int(word) for word in text.split()]
    return found


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()
