"""What a comparison found, as frozen values: rows of trials, and the verdict drawn from them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.results import CLOSED, Result
from kpsvd_tune.storage.json_files import check_types, read_json
from kpsvd_tune.units import duration, money, size


@dataclass(frozen=True, order=True)
class Trial:
    """One training run of a comparison."""

    method: str
    budget: int  # trainable parameters it may have
    learning_rate: float  # its highest learning rate
    seed: int  # seeds the order of the rows, dropout, and whatever the method draws

    @property
    def folder_name(self) -> str:
        """A file name of its own."""
        method = re.sub(r"[^A-Za-z0-9.+=-]+", "_", self.method)
        return f"{method}-{self.budget}-{self.learning_rate!r}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.method} at {self.budget:,}, rate {self.learning_rate:g}, seed {self.seed}"


# Keys that earlier versions wrote and that nothing reads.
_FORMER = {"cpu_seconds_per_step"}


@dataclass(frozen=True)
class TrialRow(Result):
    """One training run of a comparison: a line of results.jsonl."""

    __pydantic_config__ = CLOSED
    method: str
    budget: int  # trainable parameters it might have
    learning_rate: float  # its highest learning rate
    seed: int  # seed of the order of the rows and of whatever the method draws
    rank: str  # rank, or smallest and largest one as 1-4
    trainable_parameters: int  # what it trained
    stored_parameters: int  # what an adapter for the unmodified base holds
    validation_loss: float | None  # loss on the held-out rows at the end; None where the run failed
    # (step, loss) over the run, the first before any step.
    validation_losses: tuple[tuple[int, float], ...]
    test_loss: float | None  # loss on the test rows at the end, which no choice looks at
    forgetting: float | None  # loss on the forgetting text after training minus the base model's
    losses: tuple[float, ...]  # training loss of every step
    grad_norms: tuple[float, ...]  # norm of the gradient of every step, before clipping
    seconds_per_step: float  # median wall time of a step
    init_seconds: float  # time to make the adapter: decomposition, or PEFT's own start
    wall_seconds: float  # time of the training
    peak_memory_bytes: int  # most memory held: of the device, or resident on a CPU
    failed: str | None = None  # why the run ended early; None otherwise

    @property
    def trial(self) -> Trial:
        """Which trial it is the row of."""
        return Trial(self.method, self.budget, self.learning_rate, self.seed)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialRow:
        """Read a line of results.jsonl.

        Raises:
            InputError: A key is missing or unknown, or a value is of another type.
        """
        found = {key: value for key, value in data.items() if key not in _FORMER}
        try:
            row: TrialRow = check_types(found, cls)
        except ValueError as error:
            raise InputError(
                f"a row of results.jsonl {error}; expected rows of this version: choose another "
                "output_dir"
            ) from error
        return row


@dataclass(frozen=True)
class Estimate(Result):
    """A mean over seeds."""

    mean: float
    deviation: float | None  # standard deviation over seeds; None for one seed
    low: float | None  # ends of the 95 % confidence interval (Student's t); None for one seed
    high: float | None
    n: int  # seeds

    def interval(self, digits: int = 4) -> str:
        """The confidence interval in words, with the number of seeds."""
        if self.low is None or self.high is None:
            return "one seed"
        return f"95 % interval {self.low:+.{digits}f} to {self.high:+.{digits}f}, n = {self.n}"


@dataclass(frozen=True)
class MethodSummary(Result):
    """One method at one budget, at its best learning rate."""

    method: str
    budget: int  # trainable parameters it might have
    trainable_parameters: int  # what it trained
    stored_parameters: int  # what an adapter for the unmodified base holds
    rank: str  # rank, or smallest and largest one
    # The rate with the lowest mean validation loss among those with most seeds.
    learning_rate: float
    # Whether that rate is the lowest or highest tried, so that a better one may lie outside.
    is_edge: bool
    num_trials: int  # trials of this method at this budget
    validation_loss: Estimate  # over seeds
    test_loss: Estimate | None  # over seeds; None without test rows
    # Steps until the validation loss is at the lowest point of the reference's mean curve,
    # interpolated between validations, over the seeds that get there; None where none does.
    steps_to_reference: Estimate | None
    seconds_to_reference: float | None  # those steps times the seconds of a step
    gradient_variation: Estimate  # coefficient of variation of the gradient norm after warm-up
    clipped_share: float  # share of the steps whose gradient was clipped, 0 to 1
    forgetting: Estimate | None  # loss change on the forgetting text; None without one
    seconds_per_step: float  # median over seeds
    init_seconds: float  # median over seeds
    peak_memory_bytes: int  # largest over seeds
    # Device time of one run, init included, times the price; None without a price.
    cost: float | None
    # Whether it is a baseline of this project's own, for PEFT has no such method.
    is_ours: bool = False

    def in_words(self, currency: str = "") -> dict[str, str]:
        """The cell of every column of the tables, on the console and on the page."""
        steps, num_seeds = self.steps_to_reference, self.validation_loss.n
        seconds = self.seconds_to_reference
        reached = "–" if steps is None else f"{steps.mean:.0f}"
        if steps is not None and steps.n != num_seeds:
            reached += f" ({steps.n} of {num_seeds})"
        return {
            "method": f"{self.method} (ours)" if self.is_ours else self.method,
            "budget": f"{self.budget:,}",
            "trained": f"{self.trainable_parameters:,}",
            "stored": f"{self.stored_parameters:,}",
            "rank": self.rank,
            "rate": f"{self.learning_rate:g}{' (edge)' if self.is_edge else ''}",
            "trials": str(self.num_trials),
            "validation loss": plus_minus(self.validation_loss),
            "test loss": plus_minus(self.test_loss),
            "forgetting": "–" if self.forgetting is None else f"{self.forgetting.mean:+.4f}",
            "steps to reference": reached,
            "time to it": "–" if seconds is None else duration(seconds),
            "time a step": f"{self.seconds_per_step:.2f} s",
            "start": duration(self.init_seconds),
            "peak memory": size(self.peak_memory_bytes),
            "cost": "–" if self.cost is None else f"{money(self.cost)} {currency}",
            "gradient CV": f"{self.gradient_variation.mean:.3f}",
            "clipped": f"{self.clipped_share:.0%}",
        }


@dataclass(frozen=True)
class Difference(Result):
    """A method against another, seed by seed, each at its best rate."""

    method: str
    budget: int  # its budget
    other: str  # the method it is compared with
    other_budget: int  # that one's budget
    loss: Estimate  # validation loss of the method minus the other's; below 0 the method is better


@dataclass(frozen=True)
class Claim(Result):
    """One claim about KPSVD, and what the trials say."""

    text: str
    verdict: str  # held, not held, or undecided
    figure: str  # the figures behind the verdict


@dataclass(frozen=True)
class Recommendation(Result):
    """What to do on this data."""

    text: str  # the method with its size and rate, and why; or why none of them
    undecided: tuple[str, ...]  # what the trials leave open, each as the end of "not decided: ..."


@dataclass(frozen=True)
class Comparison(Result):
    """The verdict of a comparison: the content of comparison.json."""

    model: str
    steps: int  # optimiser steps of every trial
    # Losses of the base model: validation_loss, test_loss, forgetting_loss.
    base: Mapping[str, float | None]
    recommendation: Recommendation  # what to do, in words
    reference: str  # the method that the others are compared with
    summaries: tuple[MethodSummary, ...]  # every method at every budget that has trials
    differences: tuple[Difference, ...]
    claims: tuple[Claim, ...]  # the claims that these trials can test
    notes: tuple[str, ...]  # what a reader must know
    currency: str  # of the costs


def read_comparison(folder: Path) -> Comparison:
    """Return the verdict that a comparison wrote.

    Raises:
        InputError: There is no verdict yet, or the file is not what a comparison writes.
    """
    file = folder / "comparison.json"
    if not os.path.isfile(file):
        raise InputError(
            f"{folder} is the folder of a comparison without a verdict yet: run the command "
            "`kpsvd-tune compare` again, or with --plan done to judge the trials that are there"
        )
    cure = "write it again with `kpsvd-tune compare` and --plan done"
    return read_json(file, Comparison, error=InputError, cure=cure)


def plus_minus(found: Estimate | None) -> str:
    """A mean with its deviation over seeds."""
    if found is None:
        return "–"
    return f"{found.mean:.4f}" + ("" if found.deviation is None else f" ± {found.deviation:.4f}")
