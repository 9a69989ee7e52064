"""How much running sandboxes use in all their processes, seen from outside."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage:
    """Watches processes and all that descend from them.

    Resource limits hold for each process, and no option of bubblewrap limits the number of files;
    this sees both together. What is used between two looks goes unseen, so look often.

    Args:
        pids: the processes that were started.
        scratch: where their /tmp comes from, as an open folder that `limits` sends before
            anything foreign runs, so that no right to look into their processes is needed.
            Nothing ever comes without a sandbox.

    Attributes:
        cpu_seconds: the most processor time seen of any one process.
        memory_bytes: memory of all processes and files in /tmp, when last looked at.
        num_files: files and folders in /tmp, when last looked at.
    """

    def __init__(self, pids: Sequence[int], scratch: Sequence[socket.socket]) -> None:
        self.cpu_seconds = 0.0
        self.memory_bytes = 0
        self.num_files = 0
        self._pids = pids
        self._senders = list(scratch)
        for sender in scratch:
            sender.setblocking(False)
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
        """Memory of all processes with shared pages counted once; slower than a look.

        Falls back to what the last look counted where the system does not tell.
        """
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
        for sender in tuple(self._senders):
            with suppress(BlockingIOError):
                self._folders += socket.recv_fds(sender, 1, 1)[1]
                self._senders.remove(sender)
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
