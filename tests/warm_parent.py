"""The parent of warm.py's processes: it has imported once what every command loads, then forks.

Usage: warm_parent.py FD, the number of a socket on which each message asks for one process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import sys
import time
from importlib.util import find_spec
from types import ModuleType
from typing import Any

IMPORTED = (
    *("transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama"),
    *("accelerate", "datasets", "numpy.ma", "peft"),
    *("kpsvd_tune.commands.main", "kpsvd_tune.context", "kpsvd_tune.training.stages"),
    *("kpsvd_tune.comparison.workers", "kpsvd_tune.export.lora", "kpsvd_tune.merge"),
)
LARGEST = 2**17  # bytes of a message, most of which are environment variables
MOST = 16  # streams of a process and files that it keeps open
ABOVE = 500  # above the numbers of files that a process may ask to keep
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def serve(channel: socket.socket) -> list[str] | None:
    """Fork a process for each message: its command in the new process, None here at the end."""
    while True:
        message, streams, _, _ = socket.recv_fds(channel, LARGEST, MOST)
        if not message:
            return None
        between = os.fork()
        if between == 0:
            return _between(channel, json.loads(message), streams)
        os.waitpid(between, 0)
        for stream in streams:
            os.close(stream)


def _between(channel: socket.socket, asked: dict[str, Any], streams: list[int]) -> list[str] | None:
    """Fork once more and end, so that the tests' process, which adopts orphans, is the parent.

    Gives what `serve` gives, for the new process or one of those that it asks for.
    """
    parent = os.getpid()
    if os.fork():
        # Dies without what coverage and others do at an exit.
        os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.0005)
    streams = [above(stream) for stream in streams]
    for number, stream in zip((0, 1, 2, *asked["kept"]), streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    if asked["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    if warm.BELOW in os.environ:
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, theirs = (socket.socket(fileno=above(each.detach())) for each in pair)
        if _is_forked_to_serve():
            channel.close()
            ours.close()
            return serve(theirs)
        theirs.close()
        warm.start_below(ours)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _start_anew()
    channel.send(str(os.getpid()).encode())
    channel.close()
    return list(asked["command"])


def _is_forked_to_serve() -> bool:
    """Fork: True in the new process, which ends with this one and does not hear its signals."""
    parent = os.getpid()
    if os.fork():
        return False
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return True


def above(file: int) -> int:
    """The same file under a number that no process asks to keep for its own."""
    number = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, ABOVE)
    os.close(file)
    return number


def _start_anew() -> None:
    """Set what a new process would set itself."""
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        # Streams remember of their file what was true when they were made.
        options: dict[str, Any] = {"closefd": False}
        if number == 2:
            options |= {"buffering": 1, "errors": "backslashreplace"}
        stream = open(number, "w" if number else "r", **options)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    random.seed()
    if "torch" in sys.modules and (threads := os.environ.get("OMP_NUM_THREADS")):
        sys.modules["torch"].set_num_threads(int(threads))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    with contextlib.suppress(ImportError):
        import coverage

        coverage.process_startup(force=True)


def become(command: list[str]) -> None:
    """Do what Python does for `-m MODULE`, `-c PROGRAM` or a file, and arguments."""
    if command[0] == "-u":
        command = command[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), vars(main))
    else:
        sys.argv = command
        sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
        runpy.run_path(command[0], run_name="__main__")


def prepare() -> None:
    """Do once what commands do first; transformers loads DeepSpeed where it is installed."""
    for name in IMPORTED:
        importlib.import_module(name)
    if find_spec("deepspeed"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        importlib.import_module("deepspeed")
    pages = importlib.import_module("kpsvd_tune.report.pages")
    if script := pages._plotly():
        pages._packed(script)  # kept for all pages of a process
    # What is imported stays for good: a collection in a child would copy all its pages.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    import warm

    sys.path.pop(0)  # this folder, which is on no other process's path
    prepare()
    if (asked := serve(socket.socket(fileno=above(int(sys.argv[1]))))) is not None:
        become(asked)
