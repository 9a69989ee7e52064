"""What a command says while it works: stages, notes and progress."""

from __future__ import annotations

from typing import Protocol

from kpsvd_tune.report.results import Event, PreflightReport, RankReport, StepMetrics


class Events(Protocol):
    """What a command tells whoever started it."""

    def stage(self, text: str) -> None:
        """Say what begins now."""

    def note(self, text: str) -> None:
        """Say something in passing."""

    def tell(self, event: Event) -> None:
        """Show a warning or a fallback, with its cure."""

    def preflight(self, report: PreflightReport) -> None:
        """Show what will be trained on."""

    def ranks(self, report: RankReport) -> None:
        """Show the totals of the chosen ranks."""

    def step(self, metrics: StepMetrics, total: int) -> None:
        """Report one training step."""

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Report progress of a phase."""

    def end_progress(self) -> None:
        """Close the bar that is open, if any."""


class Silence(Events):
    """Events that nobody is told of, for work that is done on the side."""

    def stage(self, text: str) -> None:
        """Say nothing."""
        return

    def note(self, text: str) -> None:
        """Say nothing."""
        return

    def tell(self, event: Event) -> None:
        """Show nothing."""
        return

    def preflight(self, report: PreflightReport) -> None:
        """Show nothing."""
        return

    def ranks(self, report: RankReport) -> None:
        """Show nothing."""
        return

    def step(self, metrics: StepMetrics, total: int) -> None:
        """Report nothing."""
        return

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Report nothing."""
        return

    def end_progress(self) -> None:
        """Have no bar to close."""
        return
