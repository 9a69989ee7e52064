"""The device time that a comparison has taken, over all of its calls; kept in account.json.

Several calls at a time, on machines that share the folder, add to the same account.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from kpsvd_tune.report.comparison import TrialRow
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import replace_file
from kpsvd_tune.storage.json_files import read_json, to_json
from kpsvd_tune.storage.locks import hold

ACCOUNT = "account.json"
# A kill loses at most what passed since the account was written.
_WRITE_SECONDS = 2.0


class Account:
    """Adds up device time from when it was opened to what earlier calls have taken.

    Args:
        folder: The comparison's folder.
        rows: Trials that are done: of a folder without an account, which an earlier version
            began, their times are what is known.
        devices: Devices that this machine has; trials beyond their number share them.
        since: When this call began, by time.monotonic(): preparing takes device time too.
    """

    def __init__(self, folder: Path, rows: Sequence[TrialRow], devices: int, since: float) -> None:
        self._file, self._devices = folder / ACCOUNT, devices
        self.device_seconds = recorded_seconds(folder, rows)
        self._unwritten = 0.0  # of those, what this call has not put into the file yet
        self._last = self._written = since

    def tick(self, busy: int = 1) -> None:
        """Count the time since the last call, in which ``busy`` trials ran; none still hold one."""
        now = time.monotonic()
        spent = (now - self._last) * max(1, min(busy, self._devices))
        self.device_seconds += spent
        self._unwritten += spent
        self._last = now
        if now - self._written >= _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Put the account on the disk, with what other calls have added to it meanwhile."""
        self._written = time.monotonic()
        lock = self._file.with_name(".account.lock")
        with explained(f"lock {lock}"), hold(lock, wait=True):
            if self._file.exists():
                self.device_seconds = recorded_seconds(self._file.parent, ()) + self._unwritten
            replace_file(self._file, to_json({"device_seconds": self.device_seconds}))
        self._unwritten = 0.0


def recorded_seconds(folder: Path, rows: Sequence[TrialRow]) -> float:
    """Device time of the earlier calls in a folder."""
    file = folder / ACCOUNT
    if not file.exists():
        return sum(row.seconds for row in rows)
    cure = "remove it, and the times of the finished trials are counted instead"
    found = read_json(file, dict[str, float], cure=cure)
    return found.get("device_seconds", 0.0)
