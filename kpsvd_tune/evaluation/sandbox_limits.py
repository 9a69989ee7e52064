"""The limits a process of the sandbox sets itself, before anything foreign runs in it.

Imports the standard library alone, because it runs in a bare interpreter too.
"""

import os
import resource
from typing import Any


def set_limits(job: dict[str, Any]) -> None:
    """Become nobody where we are root, and take the job's limits."""
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
