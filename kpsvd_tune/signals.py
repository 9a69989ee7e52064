"""SIGINT and SIGTERM as a request, answered at once. A second one ends the process at once.

Python runs a handler only when the main thread comes back to its own code, which a backward pass or
a decomposition may keep it from for a minute. So a thread waits for the signal as well: it says
what is going to happen, and it ends the process when another signal comes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from kpsvd_tune.errors import UNSAVED_EXIT_CODE

# A launcher passes a signal on to processes that the terminal has signalled already: two within
# this time are one request.
_SAME_REQUEST_SECONDS = 1.0
# An immediate stop that takes longer is told of.
_PROMPT_SECONDS = 0.5
_BOTH = (signal.SIGINT, signal.SIGTERM)
_END_OF_THREAD = b"\0"


class StopSignals:
    """Catches the two signals inside a `with` block; blocks inside another take over from it.

    Args:
        outlook: Asked at the first signal, for what happens now: "finishing step 12". Called from
            another thread, so it may only look.
        loss: Asked at the second one, for what is lost.
        is_immediate: Raise KeyboardInterrupt at the first signal, where there is nothing to finish.
            The outlook is told only where that takes a while, and the second one loses nothing
            more than the first.

    Attributes:
        requested: Number of the first signal that came, 0 until then.
    """

    def __init__(
        self,
        outlook: Callable[[], str] = lambda: "finishing what runs",
        loss: Callable[[], str] = lambda: "what was not saved is lost",
        *,
        is_immediate: bool = False,
    ) -> None:
        self.requested = 0
        self._outlook, self._loss, self._is_immediate = outlook, loss, is_immediate
        self._raised = threading.Event()
        self._since: float | None = None
        self._earlier: dict[int, Any] = {}
        self._ends: tuple[int, int] | None = None
        self._earlier_end = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        """Take over the handlers; outside the main thread Python allows none, and none is taken."""
        if threading.current_thread() is not threading.main_thread():
            return self
        self._ends = os.pipe()
        os.set_blocking(self._ends[1], False)
        self._earlier_end = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
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
        if self._ends is None or self._thread is None:
            return
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier_end, warn_on_full_buffer=False)
        # Told by a byte, as a worker that was forked meanwhile holds the end open as well.
        os.write(self._ends[1], _END_OF_THREAD)
        self._thread.join()
        for end in self._ends:
            os.close(end)
        self._ends = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = self.requested or number
        if self._is_immediate and not self._raised.is_set():
            self._raised.set()
            raise KeyboardInterrupt

    def _listen(self) -> None:
        assert self._ends is not None
        while True:
            # Each byte is the number of a signal; others than ours come too.
            for number in os.read(self._ends[0], 64):
                if number == _END_OF_THREAD[0]:
                    return
                if number in _BOTH:
                    self._answer(number)

    def _answer(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self._since is None:
            self._since, self.requested = now, self.requested or number
            if not (self._is_immediate and self._raised.wait(_PROMPT_SECONDS)):
                tell(f"{name}: {self._outlook()}; again to stop now")
        elif now - self._since >= _SAME_REQUEST_SECONDS:
            # No clean-up: checkpoints are committed by a rename, so there is nothing to damage.
            tell(f"stopped at once by a second {name}: {self._loss()}", is_last=True)
            os._exit(128 + number if self._is_immediate else UNSAVED_EXIT_CODE)


def tell(line: str, *, is_last: bool = False) -> None:
    """Write a line to stderr from wherever a signal finds the program.

    Of several processes only the first says it, and a process that another one attends does not.
    """
    if int(os.environ.get("RANK", "0")) or multiprocessing.parent_process() is not None:
        return
    if os.isatty(2):
        # Over the line of a progress bar, which is drawn anew below; the last one brings back the
        # cursor that the bar hides.
        line = f"\r\x1b[2K{line}" + "\x1b[?25h" * is_last
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


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
