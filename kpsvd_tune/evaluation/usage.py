"""How much a running sandbox uses in all its processes, seen from outside."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage:
    """Watches the processes that descend from one.

    Resource limits hold for each process, and no option of bubblewrap limits the number of files;
    this sees both together. What is used between two looks goes unseen, so look often.

    Args:
        pid: the process that was started; it is not counted itself where it is bubblewrap.
        scratch_bytes: size of the sandbox's /tmp, by which it is known; None without a sandbox.

    Attributes:
        cpu_seconds: the most processor time seen of any one process.
        memory_bytes: memory of all processes and files in /tmp, when last looked at.
        num_files: files and folders in /tmp, when last looked at.
    """

    def __init__(self, pid: int, scratch_bytes: int | None) -> None:
        self.cpu_seconds = 0.0
        self.memory_bytes = 0
        self.num_files = 0
        self._pid = pid
        self._scratch_bytes = scratch_bytes
        self._scratch: int | None = None

    def look(self) -> None:
        """Bring the attributes up to date."""
        pids = _descendants(self._pid)
        memory = 0
        for pid in pids:
            with suppress(OSError, ValueError, IndexError):
                # Behind the command's name, which may hold spaces and brackets.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self.cpu_seconds = max(
                    self.cpu_seconds, (int(fields[11]) + int(fields[12])) / _TICKS
                )
                memory += int(fields[21]) * _PAGE
        if self._scratch is None and self._scratch_bytes is not None:
            self._scratch = _open_scratch(pids, self._scratch_bytes)
        if self._scratch is not None:
            status = os.fstatvfs(self._scratch)
            self.num_files = status.f_files - status.f_ffree
            memory += (status.f_blocks - status.f_bfree) * status.f_frsize
        self.memory_bytes = memory

    def shared_memory_bytes(self) -> int:
        """Memory of all processes with shared pages counted once; slower than a look.

        Falls back to what the last look counted where the system does not tell.
        """
        total = 0
        for pid in _descendants(self._pid):
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except PermissionError:
                return self.memory_bytes
            except OSError:
                continue  # it has just ended
            for line in text.splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        if self._scratch is not None:
            status = os.fstatvfs(self._scratch)
            total += (status.f_blocks - status.f_bfree) * status.f_frsize
        return total

    def close(self) -> None:
        """Let the sandbox's files go."""
        if self._scratch is not None:
            os.close(self._scratch)
            self._scratch = None


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{each}/task"):
                with suppress(OSError):
                    text = Path(f"/proc/{each}/task/{thread}/children").read_text()
                    found += [int(word) for word in text.split()]
    return found


def _open_scratch(pids: list[int], scratch_bytes: int) -> int | None:
    """The sandbox's /tmp, told from every other file system by its size and its kind."""
    ours = os.stat("/tmp").st_dev
    for pid in reversed(pids):
        with suppress(OSError):
            folder = os.open(f"/proc/{pid}/root/tmp", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
            status = os.fstatvfs(folder)
            is_its = status.f_blocks * status.f_frsize == scratch_bytes
            if is_its and os.fstat(folder).st_dev != ours:
                return folder
            os.close(folder)
    return None
