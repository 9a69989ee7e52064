"""SIGINT and SIGTERM as a request to stop; a second signal ends the process at once.

Python runs a handler only when the main thread returns to Python code, and a backward pass or a
decomposition may take a minute until then. So a thread waits for signals as well: it says what will
happen, and it ends the process when a second signal comes.
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
from types import FrameType

from kpsvd_tune.errors import UNSAVED_EXIT_CODE

# The terminal and a launcher may both signal the same process: two signals within this time are one
# request.
_SAME_REQUEST_SECONDS = 1.0
# An immediate stop that takes longer is announced.
_PROMPT_SECONDS = 0.5
_BOTH = (signal.SIGINT, signal.SIGTERM)
_END_OF_THREAD = b"\0"
_drawings: list[Callable[[], None]] = []


class StopSignals:
    """Catches the two signals inside a `with` block; a block inside another takes over from it.

    Args:
        outlook: Gives what happens after the first signal, such as "finishing step 12". Called
            from another thread, so it may only look.
        loss: Gives what a second signal loses; called from that thread as well.
        is_immediate: Raise KeyboardInterrupt at the first signal, where there is nothing to finish.
            The outlook is then shown only where that takes a while, and a second signal loses no
            more than the first.
    """

    def __init__(
        self,
        outlook: Callable[[], str] = lambda: "finishing what runs",
        loss: Callable[[], str] = lambda: "what was not saved is lost",
        *,
        is_immediate: bool = False,
    ) -> None:
        self.requested = 0  # number of the first signal that came
        self._outlook, self._loss, self._is_immediate = outlook, loss, is_immediate
        self._raised = threading.Event()
        self._since: float | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        """Take over the handlers; outside the main thread Python allows none, and none is taken."""
        if threading.current_thread() is not threading.main_thread():
            return self
        undo = self._undo.callback
        read_end, write_end = os.pipe()
        for end in (read_end, write_end):
            undo(os.close, end)
        os.set_blocking(write_end, False)
        thread = threading.Thread(
            target=self._listen, args=(read_end,), name="signals", daemon=True
        )
        thread.start()
        undo(thread.join)
        # Ended by a byte, as a worker that was forked meanwhile holds the end open as well.
        undo(os.write, write_end, _END_OF_THREAD)
        earlier_end = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        undo(signal.set_wakeup_fd, earlier_end, warn_on_full_buffer=False)
        for number in _BOTH:
            undo(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        """Give the handlers back."""
        self._undo.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = self.requested or number
        if self._is_immediate and not self._raised.is_set():
            self._raised.set()
            raise KeyboardInterrupt

    def _listen(self, read_end: int) -> None:
        while True:
            # Each byte is the number of a signal; others than ours come too.
            for number in os.read(read_end, 64):
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


@contextmanager
def drawing(leave: Callable[[], None]) -> Iterator[None]:
    """Where several lines are drawn again and again: ``leave`` ends that before `tell` writes.

    It is called from another thread. The drawing would else wipe the line out.
    """
    _drawings.append(leave)
    try:
        yield
    finally:
        _drawings.remove(leave)


def tell(line: str, *, is_last: bool = False) -> None:
    """Write a line to stderr, whatever the program is doing when a signal comes.

    Of several ranks only the first writes it, and worker processes do not.
    """
    if int(os.environ.get("RANK", "0")) or multiprocessing.parent_process() is not None:
        return
    for leave in list(_drawings):
        with contextlib.suppress(Exception):
            leave()
    if os.isatty(2):
        # It replaces the line of a progress bar, which is drawn again below it; the last line shows
        # the cursor again, which the bar hides.
        line = f"\r\x1b[2K{line}" + "\x1b[?25h" * is_last
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


@contextmanager
def signals_held() -> Iterator[None]:
    """Block both signals, here and in processes that are started meanwhile, until the end."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, _BOTH)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def ignore_signals(_worker: int = 0) -> None:
    """Ignore both signals in a data worker, for its parent decides what to do.

    Torch first gives a worker other handlers, so it has to be started inside `signals_held`, or a
    signal to the whole process group may end it before this is called.
    """
    for number in _BOTH:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BOTH)
