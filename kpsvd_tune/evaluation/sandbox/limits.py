"""The limits a process of the sandbox sets itself, before anything foreign runs in it.

Imports the standard library alone, and little of that, because it runs in a bare interpreter too.
"""

from __future__ import annotations

import _socket  # what `socket` is made of; that one takes long to import
import os
import resource
import sys

TYPE_CHECKING = False  # `typing` takes long to import
if TYPE_CHECKING:
    from typing import Any


def set_limits(job: dict[str, Any]) -> None:
    """Send /tmp out to be watched, become nobody where we are root, take the job's limits.

    What is read from standard input afterwards is empty.
    """
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if job["scratch"] is not None:
        folder = os.open("/tmp", os.O_PATH | os.O_DIRECTORY)
        sender = _socket.socket(fileno=job["scratch"])
        rights = folder.to_bytes(4, sys.byteorder)
        sender.sendmsg([b"/"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        sender.close()
        os.close(folder)
    if job["uid"] is not None:
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])
    for name, value in job["limits"].items():
        limit = getattr(resource, name)
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        # A second more before the kill: the signal that comes first tells why a program ended.
        hard = value + (name == "RLIMIT_CPU" and value != most)
        resource.setrlimit(limit, (value, hard))
