"""Run one command with a deadline and a cap on what it writes; nothing of it is left behind."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from kpsvd_tune.evaluation.bubblewrap import ENVIRONMENT


@dataclass
class Capture:
    """What came out of one run.

    Attributes:
        verdict: what it wrote to standard output, where the runner tells how it went.
        output: what it wrote to standard error, where the program's own output goes.
        stopped: why it was ended; None where it ended by itself.
    """

    verdict: bytearray = field(default_factory=bytearray)
    output: bytearray = field(default_factory=bytearray)
    stopped: Literal["timeout", "output"] | None = None


def capture_run(
    command: list[str],
    job: bytes,
    *,
    wall_seconds: float,
    output_bytes: int,
    descriptors: tuple[int, ...] = (),
) -> Capture:
    """Run a command in a new session and an empty folder, and kill what is left of it.

    Args:
        command: what to run.
        job: its standard input.
        wall_seconds: when to end it.
        output_bytes: most bytes of either stream; one that writes more is ended.
        descriptors: open files to pass on.
    """
    capture = Capture()
    with (
        tempfile.TemporaryDirectory(prefix="kpsvd-tune-") as folder,
        tempfile.TemporaryFile() as file,
    ):
        file.write(job)
        file.seek(0)
        process = subprocess.Popen(
            command,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
            pass_fds=descriptors,
        )
        try:
            _collect(process, capture, wall_seconds, output_bytes)
        finally:
            # Killing bubblewrap ends its process namespace, and with it all that was started there.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Not read to their ends: without a sandbox a child left behind may hold them open.
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
            process.wait()
    # 128 + the signal is how bubblewrap passes on what ended its program.
    if capture.stopped is None and process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        capture.stopped = "timeout"
    return capture


def _collect(
    process: subprocess.Popen[bytes], capture: Capture, wall_seconds: float, output_bytes: int
) -> None:
    """Read verdict and output until the program ends, breaks a limit or its time is up."""
    deadline = time.monotonic() + wall_seconds
    with selectors.DefaultSelector() as selector:
        for stream, sink in ((process.stdout, capture.verdict), (process.stderr, capture.output)):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, sink)
        while True:
            # Asked before reading: what a program wrote before its end is then still read.
            has_ended = process.poll() is not None
            left = deadline - time.monotonic()
            if left <= 0 and not has_ended:
                capture.stopped = "timeout"
                return
            events = selector.select(0 if has_ended else min(left, 0.05))
            if has_ended and not events:
                return
            for key, _ in events:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk[: output_bytes - len(key.data)])
                if len(key.data) >= output_bytes:
                    capture.stopped = "output"
                    return
