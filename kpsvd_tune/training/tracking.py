"""Trackers, through Accelerate: useful while they work, and never a reason to stop."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import (  # type: ignore[import-untyped]
    GeneralTracker,
    TensorBoardTracker,
    WandBTracker,
)

_log = logging.getLogger(__name__)
_PROJECT = "kpsvd-tune"


class Tracking:
    """Sends numbers to the trackers that the accelerator was made with (`log_with`, `project_dir`).

    A tracker that fails is reported once and then left alone, for the run matters more. `config` is
    shown as the run's settings, with dotted names; without it no tracker is started.
    """

    def __init__(self, accelerator: Accelerator, config: Mapping[str, Any] | None) -> None:
        self._trackers: list[GeneralTracker] = []
        if config is None or not accelerator.is_main_process:
            return
        plain = dict(_plain(config))
        for kind in accelerator.log_with:
            name = str(kind)
            # Not by Accelerator.init_trackers: there one that fails takes the others with it.
            self._attempt(name, partial(self._start, name, accelerator.logging_dir, plain))

    def log(self, numbers: Mapping[str, Any], step: int) -> None:
        """Send the numbers of one step; what is no number is left out."""
        numbers = {key: value for key, value in numbers.items() if isinstance(value, int | float)}
        for tracker in list(self._trackers):
            self._attempt(tracker.name, partial(tracker.log, numbers, step=step))

    def end(self) -> None:
        """Close the trackers."""
        for tracker in list(self._trackers):
            self._attempt(tracker.name, tracker.finish)
        self._trackers.clear()

    def _start(self, name: str, folder: str | Path, settings: dict[str, Any]) -> None:
        tracker = make_tracker(name, folder)
        tracker.start()
        self._trackers.append(tracker)
        tracker.store_init_configuration(settings)

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        try:
            # Standard output is the command's result; some trackers talk there.
            with redirect_stdout(sys.stderr):
                action()
        except Exception as error:
            self._trackers = [each for each in self._trackers if each.name != name]
            _log.warning(
                "tracking by %s stopped, training goes on: %s: %s",
                name,
                type(error).__name__,
                error,
            )


def make_tracker(name: str, folder: str | Path) -> GeneralTracker:
    """Make a tracker of Accelerate, named after the run, with its files in its logs."""
    if name == "tensorboard":
        return TensorBoardTracker(_PROJECT, folder)
    run_name = Path(folder).absolute().parent.name
    return WandBTracker(_PROJECT, name=run_name, dir=str(folder))


def _plain(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        # Keys that are a user's own, such as patterns, may be no names to a tracker.
        if isinstance(value, Mapping) and all(str(inner).isidentifier() for inner in value):
            yield from _plain(value, f"{prefix}{key}.")
        else:
            is_plain = isinstance(value, bool | int | float | str)
            yield f"{prefix}{key}", value if is_plain else str(value)
