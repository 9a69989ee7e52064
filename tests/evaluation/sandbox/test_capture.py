"""What running sandboxes use, seen from outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from kpsvd_tune.evaluation.sandbox.capture import Usage


def test_the_files_of_a_folder_that_was_sent_are_counted():
    ours, theirs = socket.socketpair()
    folder = os.open("/dev/shm", os.O_PATH | os.O_DIRECTORY)
    name = Path(f"/dev/shm/kpsvd-{os.urandom(8).hex()}")
    with ours, theirs:
        usage = Usage((), ours)
        usage.look()
        assert (usage.num_files, usage.memory_bytes) == (0, 0)  # nothing has come yet
        socket.send_fds(theirs, [b"/"], [folder])
        os.close(folder)
        usage.look()
        files, memory = usage.num_files, usage.memory_bytes
        assert files > 0
        try:
            name.write_bytes(bytes(2**22))
            usage.look()
        finally:
            name.unlink()
        assert usage.num_files > files - 50
        assert usage.memory_bytes >= memory + 2**21
        usage.close()


def test_a_sender_that_ends_without_a_word_stops_nothing():
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        usage = Usage((os.getpid(),), ours)
        usage.look()
        usage.look()
        assert usage.num_files == 0
        assert usage.memory_bytes > 2**20


def test_processes_that_descend_from_several_are_counted():
    code = "import subprocess, sys; x = b'a' * (30 * 2**20); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-S", "-c", code]
    both = [
        subprocess.Popen(
            ["/bin/sh", "-c", '"$@"; true', "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    try:
        for each in both:
            assert each.stdout is not None
            each.stdout.readline()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            usage = Usage([each.pid for each in both], ours)
            usage.look()
            assert usage.memory_bytes > 60 * 2**20
            assert usage.shared_memory_bytes() > 60 * 2**20
    finally:
        for each in both:
            each.communicate()
