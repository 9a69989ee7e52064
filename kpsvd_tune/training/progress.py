"""Where a training stands: the counters that a checkpoint keeps beside tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from kpsvd_tune.recipe import EarlyStopping
from kpsvd_tune.report.results import StepMetrics

# Steps whose mean loss is reported as the training loss: enough to smooth one odd batch.
_RECENT_STEPS = 10


@dataclass
class Progress:
    """Counters after `step` optimiser steps; JSON values only."""

    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # spent in this run, over all its sessions
    # (summed loss, supervised tokens) of the last steps.
    recent: list[list[float]] = field(default_factory=list)
    validation_loss: float | None = None  # the newest one
    validation_loss_before: float | None = None  # the one before the first step
    best_validation_loss: float | None = None  # the lowest that early stopping counted as a gain
    num_stale: int = 0  # validations since then
    is_stopped_early: bool = False  # early stopping ended the run
    best_step: int | None = None  # of the lowest validation loss of all; its checkpoint is kept
    best_step_loss: float | None = None  # that loss
    num_skipped: int = 0  # steps skipped because something was not finite
    skip_streak: int = 0  # those of them since the last step that was taken
    num_retries: int = 0  # returns to a checkpoint because something was not finite
    rate_factor: float = 1.0  # what they left of the learning rate
    # Rows a pass, where memory asked for fewer than `batch_size`.
    micro_batch_size: int | None = None
    num_halvings: int = 0  # how often it did
    pending: dict[str, Any] | None = None  # of a step that a signal left to be validated and logged

    def count_step(self, loss: float, num_supervised: float, metrics: StepMetrics) -> None:
        """Count a step that was just taken, or skipped."""
        self.step = metrics.step
        # JSON has no NaN and no infinity.
        self.pending = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(metrics).items()
        }
        if metrics.skipped is None:
            self.skip_streak = 0
            self.recent = [*self.recent, [loss, num_supervised]][-_RECENT_STEPS:]

    def pending_metrics(self) -> StepMetrics | None:
        """The metrics of a step whose validation and line are still to come."""
        if self.pending is None:
            return None
        numbers = {name: float(self.pending[name]) for name in ("loss", "grad_norm")}
        return StepMetrics(**{**self.pending, **numbers})

    def count_validation(self, loss: float, rule: EarlyStopping | None) -> None:
        """Take in a validation loss, and decide about stopping early."""
        self.validation_loss = loss
        if self.best_step_loss is None or loss < self.best_step_loss:
            self.best_step, self.best_step_loss = self.step, loss
        if rule is None:
            return
        best = self.best_validation_loss
        if best is None or loss < best - rule.min_delta:
            self.best_validation_loss, self.num_stale = loss, 0
        else:
            self.num_stale += 1
            self.is_stopped_early = self.num_stale >= rule.patience

    @property
    def train_loss(self) -> float:
        """Mean loss over the supervised tokens of the last steps."""
        num_supervised = sum(each for _, each in self.recent)
        return sum(each for each, _ in self.recent) / max(1.0, num_supervised)
