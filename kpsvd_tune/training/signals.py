"""SIGINT and SIGTERM as a request: finish the step, save, stop. A second one ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# A launcher passes a signal on to processes that the terminal has signalled already: two within
# this time are one request.
_SAME_REQUEST_SECONDS = 1.0
_BOTH = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Catches the two signals inside a `with` block.

    Attributes:
        requested: Number of the first signal that came, 0 until then.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._since = 0.0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take over the handlers; outside the main thread Python allows none, and none is taken."""
        if threading.current_thread() is threading.main_thread():
            for number in _BOTH:
                self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the handlers back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = number, now
        elif now - self._since >= _SAME_REQUEST_SECONDS:
            # No clean-up: checkpoints are committed by a rename, so there is nothing to damage.
            os._exit(128 + number)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let both signals wait; a process that is started meanwhile has them wait as well."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, _BOTH)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def ignore_signals(_worker: int = 0) -> None:
    """Leave the decision to the process that started this one: for data workers.

    Torch gives a worker handlers of its own first, so it has to be started with `signals_held`, or
    a signal to the whole group may end it before it gets here.
    """
    for number in _BOTH:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BOTH)
