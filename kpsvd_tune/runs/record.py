"""What a run tells, kept in its events.jsonl and passed on to whoever shows it.

An event is told once in a run, whatever stops and goes on: what lies in the file is known by its
kind, code, step and text, and a warning by its code alone, for as long as the settings stay.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from kpsvd_tune.errors import InputError, ResourceError
from kpsvd_tune.events import Events
from kpsvd_tune.report.events import read_events
from kpsvd_tune.report.results import Event, PreflightReport, RankReport, StepMetrics
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.watch.telling import event

_log = logging.getLogger(__name__)
_CHANGED = "changed"


class RunEvents:
    """The events of one session of a run: kept until `begin` gives them a file, then written.

    A session that never begins, as that of a finished run, leaves nothing in the folder.

    Args:
        shown: Told of everything as well.
        run: The run's folder.
        is_main: Whether this process writes; others only pass on.
    """

    def __init__(self, shown: Events, run: RunDirectory, *, is_main: bool) -> None:
        self._shown, self._run, self._is_main = shown, run, is_main
        self._waiting: list[Event] = []
        self._has_begun = False
        self._known: set[tuple[object, ...]] = set()
        self._told: list[Event] = []
        self._mark: Callable[[Event], None] | None = None

    def begin(self, changed: Mapping[str, str]) -> None:
        """Read what earlier sessions told, and write what this one has told so far.

        `changed` are the settings that differ from those of the session before: from here on every
        warning may be told again.
        """
        if not self._is_main:
            return
        try:
            for each in read_events(self._run.path):
                self._learn(each)
        except InputError as error:
            _log.warning("%s; what was told before may be told again", error)
        self._has_begun = True
        waiting, self._waiting = self._waiting, []
        if changed:
            settings = ", ".join(f"{key} {value}" for key, value in changed.items())
            # Told although an equal change may have been told before: others came between.
            note = event("note", f"Going on with {settings}.", evidence={_CHANGED: settings})
            self._learn(note)
            self._run.tell(note)
        self._told = [each for each in self._told if _key(each) not in self._known]
        for each in waiting:
            self._write(each)

    def tell(self, event: Event) -> None:
        """Tell a warning or a fallback, unless this run has told it."""
        if not self._is_main or _key(event) in self._known:
            return
        self._write(event)
        self._shown.tell(event)
        self._told.append(event)
        if self._mark is not None:
            self._mark(event)

    def mark_with(self, mark: Callable[[Event], None]) -> None:
        """Call `mark` with each warning and fallback of this session, those told by now first."""
        self._mark = mark
        for each in self._told:
            mark(each)

    def ended(self, text: str, evidence: Mapping[str, int | float | str] | None = None) -> None:
        """Keep how this session ended, where it had begun; a full disk does not matter any more."""
        if self._has_begun:
            with contextlib.suppress(ResourceError):
                self._run.tell(event("end", text, evidence=evidence))

    def stage(self, text: str) -> None:
        """Say what begins now."""
        self._shown.stage(text)
        self._write(event("stage", text))

    def note(self, text: str) -> None:
        """Say something in passing."""
        self._shown.note(text)
        self._write(event("note", text))

    def preflight(self, report: PreflightReport) -> None:
        """Show what will be trained on."""
        self._shown.preflight(report)
        for text in report.warnings:
            self._write(event("note", text))

    def ranks(self, report: RankReport) -> None:
        """Show the totals of the chosen ranks."""
        self._shown.ranks(report)

    def step(self, metrics: StepMetrics, total: int) -> None:
        """Report one training step."""
        self._shown.step(metrics, total)

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Report progress of a phase."""
        self._shown.advance(phase, done, total, detail)

    def end_progress(self) -> None:
        """Close the bar that is open, if any."""
        self._shown.end_progress()

    def _write(self, event: Event) -> None:
        if not self._is_main or _key(event) in self._known:
            return
        if not self._has_begun:
            self._waiting.append(event)
            return
        self._learn(event)
        self._run.tell(event)

    def _learn(self, event: Event) -> None:
        if _CHANGED in event.evidence:
            self._known = {key for key in self._known if key[0] != "warning"}
        self._known.add(_key(event))


def _key(event: Event) -> tuple[Any, ...]:
    if event.kind == "warning":
        return event.kind, event.code
    return event.kind, event.code, event.step, event.text
