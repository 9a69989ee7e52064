"""Regular expressions from recipes and from foreign adapters, matched within a time limit.

Python's `re` may try exponentially many ways to match: (a+)+b on thirty letters takes hours. The
module looks for signals while it works, so an alarm ends it, with the very matching that PEFT does.
"""

from __future__ import annotations

import re
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

# Usual patterns take microseconds a name, and a large model has some ten thousand names.
SECONDS = 5.0


class SlowPatternError(ValueError):
    """Matching took too long."""


def time_limit(what: str) -> AbstractContextManager[None]:
    """End what is matched inside when it takes too long, with a SlowPatternError.

    `what` is the setting, as the error names it.
    """
    error = SlowPatternError(
        f"{what} takes more than {SECONDS:g} s to match, as patterns with repeats inside repeats "
        "do, such as (a+)+; write it without them, or list the names"
    )
    return raise_after(SECONDS, error)


@contextmanager
def raise_after(seconds: float, error: Exception) -> Iterator[None]:
    """Interrupt what takes longer; a timer that somebody else has set goes on afterwards.

    Outside the main thread, where Python delivers no signals, nothing is bounded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise error

    handler: Any = signal.signal(signal.SIGALRM, stop)
    earlier = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *earlier)
        signal.signal(signal.SIGALRM, handler)


def check_patterns(patterns: Mapping[str, object], names: Iterable[str]) -> None:
    """Refuse patterns that cannot be compiled, or not be matched with some names in time.

    `patterns` has the value of each setting by its key, which the ValueError names; only texts are
    patterns.
    """
    listed = list(names)
    for key, pattern in patterns.items():
        if not isinstance(pattern, str):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                matcher = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{key} is not a regular expression: {error}") from error
        with time_limit(key):
            for name in listed:
                matcher.fullmatch(name)
