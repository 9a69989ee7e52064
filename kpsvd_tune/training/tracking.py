"""Trackers, through Accelerate: useful while they work, and never a reason to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]

_log = logging.getLogger(__name__)


class Tracking:
    """Sends numbers to the trackers that the accelerator was made with.

    A tracker that fails is reported once and then left alone, for the run matters more.

    Args:
        accelerator: Made with `log_with`.
        config: What to show as the run's settings; sections within become dotted names.
    """

    def __init__(self, accelerator: Accelerator, config: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        self._is_on = bool(accelerator.log_with)
        plain = dict(_plain(config))
        self._attempt(lambda: accelerator.init_trackers("kpsvd-tune", config=plain))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Send the numbers of one step."""
        self._attempt(lambda: self._accelerator.log(dict(numbers), step=step))

    def end(self) -> None:
        """Close the trackers."""
        self._attempt(lambda: [tracker.finish() for tracker in self._accelerator.trackers])

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self._is_on:
            return
        try:
            action()
        except Exception as error:
            self._is_on = False
            _log.warning("tracking stopped, training goes on: %s: %s", type(error).__name__, error)


def _plain(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _plain(value, f"{prefix}{key}.")
        else:
            is_plain = isinstance(value, bool | int | float | str)
            yield f"{prefix}{key}", value if is_plain else str(value)
