"""One run at a time in a folder; the system lifts the lock however the run ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from kpsvd_tune.errors import FolderInUseError
from kpsvd_tune.storage import durable
from kpsvd_tune.storage.disk import explained


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if need be.

    Raises:
        FolderInUseError: Another process holds it; the message names it.
        ResourceError: The folder cannot be made.
    """
    durable.make_folder(folder)
    with explained(f"open {folder / '.lock'}"):
        file = (folder / ".lock").open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise FolderInUseError(
                f"{folder} is in use by another run ({holder}); wait for it, stop it, or "
                "choose another output_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
