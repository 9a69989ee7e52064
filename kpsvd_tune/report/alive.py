"""A sign of life from a stage that says nothing for long, such as the loading of a large model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kpsvd_tune.units import duration


class Heartbeat:
    """Tells from time to time how long a stage has been going on, on a thread of its own.

    Args:
        tell: Called with a line, from that thread.
        seconds: Between two lines, and before the first.
    """

    def __init__(self, tell: Callable[[str], None], seconds: float) -> None:
        self._tell, self._seconds = tell, seconds
        self._ended = threading.Event()

    def begin(self, stage: str) -> None:
        """Tell of this stage until :meth:`end`, and no more of the last one."""
        self.end()
        self._ended = threading.Event()
        # A command that ends does not wait for it.
        threading.Thread(target=self._beat, args=(stage, self._ended), daemon=True).start()

    def end(self) -> None:
        """Tell nothing more."""
        self._ended.set()

    def _beat(self, stage: str, ended: threading.Event) -> None:
        began = time.monotonic()
        while not ended.wait(self._seconds):
            self._tell(f"still {stage}, {duration(time.monotonic() - began)}")
