"""An `os` module that fails, or kills the process, at one chosen operation on the disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

OPERATIONS = (
    "makedirs",
    "open",
    "write",
    "pwrite",
    "copy_file_range",
    "fsync",
    "close",
    "replace",
    "unlink",
    "rmdir",
    "truncate",
)


class FaultyOs:
    """Stands in for `os` in a module; `calls` lists the disk operations in their order.

    Args:
        strike: What happens at that operation: it raises, or ends the process.
        number: The operation, counted from 0; none for -1, which only counts.
        moment: "before" or "after" the operation. A descriptor is closed even where its close
            reports a failure, so a close is always done first.
        largest_write: The bytes that a write takes at most, as a disk may take less than it is
            given; all of them for None.
    """

    def __init__(
        self,
        strike: Callable[[], None],
        number: int,
        moment: str,
        largest_write: int | None = None,
    ) -> None:
        self.strike, self.number, self.moment = strike, number, moment
        self.largest_write = largest_write
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function: Callable[..., Any] = getattr(os, name)
        if name not in OPERATIONS:
            return function

        def call(*arguments: Any, **options: Any) -> Any:
            is_it = len(self.calls) == self.number
            self.calls.append(name)
            is_before = self.moment == "before" and name != "close"
            if is_it and is_before:
                self.strike()
            if name == "write":
                arguments = (arguments[0], bytes(arguments[1])[: self.largest_write])
            result = function(*arguments, **options)
            if is_it and not is_before:
                self.strike()
            return result

        return call


def kill() -> None:
    """End this process as a power cut would: nothing is written any more."""
    os.kill(os.getpid(), signal.SIGKILL)


def raising(fault: BaseException) -> Callable[[], None]:
    """What raises this error."""

    def strike() -> None:
        raise fault

    return strike
