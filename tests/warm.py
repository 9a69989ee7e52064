"""Processes of Python that need not import torch and transformers anew: forks of one that has.

`warm.Popen` and `warm.run` are those of `subprocess`, for commands that begin with
`sys.executable`: a start takes a tenth of a second instead of ten. Everything else is as with
`subprocess`: the process is a child of this one, with its own environment, streams, folder,
session and signals. Not for tests of a start itself: of what is imported when, of variables that
are read by an import, or of memory. Coverage measures a process unless its `env` is `unmeasured()`.
With the variable `BELOW` in its `env` what it starts itself is warm as well, as `start_below` says.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import util
from pathlib import Path
from typing import Any

# Of `subprocess`, for modules in whose place this one is put.
DEVNULL = subprocess.DEVNULL
BELOW = "KPSVD_TUNE_TESTS_WARM_BELOW"
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_given: socket.socket | None = None  # of a process that is warm itself


class Popen(subprocess.Popen[Any]):
    """A `subprocess.Popen` of a command of Python, in a process that is forked, not started."""

    def _execute_child(
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: bool,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        startupinfo: Any,
        creationflags: int,
        shell: bool,
        *rest: Any,
    ) -> None:
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = pipes = rest[:6]
        command = [os.fsdecode(each) for each in args]
        assert command[0] == sys.executable, command
        asked = {
            "command": command[1:],
            "environment": dict(os.environ if env is None else env),
            "folder": os.fspath(cwd or Path.cwd()),
            "session": bool(rest[11]),  # start_new_session
            "kept": list(pass_fds),
        }
        given = (p2cread, c2pwrite, errwrite)
        streams = [stream if stream != -1 else usual for usual, stream in enumerate(given)]
        self.pid = _ask(json.dumps(asked).encode(), [*streams, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(
    command: list[str],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, in a warm process."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def unmeasured(**variables: str) -> dict[str, str]:
    """This environment, and more, without coverage: for lines that other tests measure."""
    return {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")} | variables


def start_below(channel: socket.socket) -> None:
    """In a warm process: let what it starts be forked too, by the parent at the channel's end.

    These are ranks of `launch` and of torchrun, and the server that forks workers of a comparison.
    """
    global _given
    _given = channel
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from kpsvd_tune import launch

    launch.subprocess = sys.modules[__name__]  # type: ignore[attr-defined]
    subprocess_handler.Popen = Popen  # type: ignore[attr-defined]
    util.spawnv_passfds = fork_server(util.spawnv_passfds)  # type: ignore[assignment]


def fork_server(
    usual: Callable[[Any, Any, Any], int],
) -> Callable[[Any, Sequence[Any], Sequence[int]], int]:
    """What starts processes for `multiprocessing`, with a server for forks that is warm."""

    def start(path: Any, words: Sequence[Any], kept: Sequence[int]) -> int:
        command = [os.fsdecode(each) for each in words]
        if "multiprocessing.forkserver" not in command[-1]:
            return usual(path, words, kept)
        process = Popen([sys.executable, *command[-2:]], pass_fds=kept)
        process.returncode = 0  # multiprocessing waits for it, and nobody else
        return process.pid

    return start


def fork_unmeasured() -> int:
    """`os.fork`, for a child that is killed and so would lose what coverage had measured of it.

    Coverage begins anew in each child otherwise, which takes longer than the fork.
    """
    coverage = sys.modules.get("coverage")
    measuring = coverage.Coverage.current() if coverage else None
    if measuring is None:
        return os.fork()
    # Without it a child of coverage's begins to measure.
    config = os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    measuring.stop()
    if (pid := os.fork()) == 0:
        return 0
    # Nothing is said of what was imported before this second start.
    measuring._warn_preimported_source = False
    measuring.start()
    if config is not None:
        os.environ["COVERAGE_PROCESS_CONFIG"] = config
    return pid


def _ask(message: bytes, streams: list[int]) -> int:
    """Have a process forked, and adopt it; its number."""
    channel, libc = _given or _parent(), ctypes.CDLL(None)
    # For this moment orphans come to this process, among them the one that is asked for.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        socket.send_fds(channel, [message], streams)
        answer = channel.recv(32)
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)
    assert answer, "warm_parent.py has ended; what it said is in the standard error of the tests"
    return int(answer)


@cache
def _parent() -> socket.socket:
    """Where to ask for processes. Their common parent is started once, and ends when we do."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = Path(__file__).with_name("warm_parent.py")
    with theirs:
        process = subprocess.Popen(
            [sys.executable, str(program), str(theirs.fileno())],
            env=unmeasured(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours
