"""Stages that several commands share."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch

from kpsvd_tune.decompose import Progress
from kpsvd_tune.models import ModelSource, resolve_model
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.results import PreflightReport, RankReport, StepMetrics
from kpsvd_tune.units import time_left


class Events(Protocol):
    """What the pipeline tells whoever started it."""

    def stage(self, text: str) -> None:
        """Say what begins now."""

    def note(self, text: str) -> None:
        """Say something in passing."""

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


class SilentEvents:
    """Events that nobody watches."""

    def stage(self, text: str) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def preflight(self, report: PreflightReport) -> None:
        """Do nothing."""

    def ranks(self, report: RankReport) -> None:
        """Do nothing."""

    def step(self, metrics: StepMetrics, total: int) -> None:
        """Do nothing."""

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Do nothing."""

    def end_progress(self) -> None:
        """Do nothing."""


def find_model(recipe: Recipe, offline: bool) -> ModelSource:
    """Resolve `model.path`, fetching it where needed."""
    return resolve_model(recipe.model.path, recipe.model.revision, offline)


def report_decomposition(events: Events) -> Any:
    """A progress callback for the decomposition."""

    def advance(progress: Progress) -> None:
        detail = f"energy so far {100 * progress.energy:.1f} %"
        if left := time_left(progress.seconds_left):
            detail += f", {left}"
        events.advance("decomposing", progress.done, progress.total, detail)

    return advance


def device() -> torch.device:
    """Where single-process commands compute: the first GPU, or the CPU."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true":
        return torch.device("cuda")
    return torch.device("cpu")
