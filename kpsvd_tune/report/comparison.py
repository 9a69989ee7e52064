"""What a comparison found, as frozen values: rows of trials, and the verdict drawn from them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.results import CLOSED, Result
from kpsvd_tune.storage.json_files import check_types, read_json
from kpsvd_tune.units import counted, duration, energy, money, size


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
class TrialScore(Result):
    """What the model of a trial, or the base model, scored on a task."""

    __pydantic_config__ = CLOSED
    task: str
    scorer: str  # the rule that judged: the first of the task
    asked: str  # how the questions were asked, in words; scores of other ways are not compared
    value: float  # share of right answers, 0 to 1
    # Of every question, in their order, the share of its answers that were right: for differences
    # between models question by question.
    shares: tuple[float, ...]
    unextractable: int  # answers in which the rule found nothing to judge; they count as wrong
    seconds: float  # time the answers took


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
    losses: tuple[float, ...]  # training loss of every step, where it is finite
    # Norm of the gradient of every step, before clipping, where it is finite.
    grad_norms: tuple[float, ...]
    seconds_per_step: float  # median wall time of a step
    init_seconds: float  # time to make the adapter: decomposition, or PEFT's own start
    wall_seconds: float  # time of the training
    peak_memory_bytes: int  # most memory held: of the device, or resident on a CPU
    failed: str | None = None  # why the run ended early; None otherwise
    # Time of a device for all of the trial, from loading to measuring; None in rows of older
    # versions.
    device_seconds: float | None = None
    energy_joules: float | None = None  # of that; None where no device tells it
    score: TrialScore | None = None  # on the task of --score; None where it was not scored
    # What looked wrong while it ran, by its code: docs/watching.md. Empty in older versions' rows.
    warnings: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time of a device that the trial took."""
        known = self.device_seconds
        return self.init_seconds + self.wall_seconds if known is None else known

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

    def negated(self) -> Estimate:
        """The same of the opposite: of a difference, the other way round."""
        low = None if self.high is None else -self.high
        high = None if self.low is None else -self.low
        return Estimate(-self.mean, self.deviation, low, high, self.n)

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
    score: Estimate | None = None  # share of right answers, over seeds; None where not scored

    def in_words(self, currency: str = "") -> dict[str, str]:
        """The cell of every column of the tables, on the console and on the page."""
        steps, num_seeds = self.steps_to_reference, self.validation_loss.n
        seconds = self.seconds_to_reference
        reached = "–" if steps is None else f"{steps.mean:.1f}"
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
            "score": "–" if self.score is None else percent_plus_minus(self.score),
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
class ScoreDifference(Result):
    """The score of a method minus another's, question by question, over the seeds in common."""

    method: str
    budget: int  # its budget
    other: str  # the method it is compared with
    other_budget: int  # that one's budget
    change: float  # share of right answers of the method minus the other's, -1 to 1
    stderr: float  # standard error of that mean over the questions
    num_questions: int
    num_seeds: int  # seeds in common; each question's share is the mean over them

    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the change, by the normal distribution."""
        half = 1.959963984540054 * self.stderr
        return self.change - half, self.change + half

    def in_words(self) -> str:
        """The change in points with its interval and what it rests on."""
        low, high = self.interval()
        seeds = counted(self.num_seeds, "seed")
        return (
            f"{100 * self.change:+.1f} points (95 % interval {100 * low:+.1f} to "
            f"{100 * high:+.1f}; {counted(self.num_questions, 'question')}, {seeds})"
        )


@dataclass(frozen=True)
class Return(Result):
    """What one run of a method at a budget takes, and what that buys."""

    method: str
    budget: int
    hours: float  # of one device: start and steps, medians over seeds
    cost: float | None  # those hours times the price; None without a price
    energy_joules: float | None  # of a whole trial, median over seeds; None where not known
    gain: float | None  # nats that the mean validation loss lies below the base model's
    points: float | None  # points that the mean score lies above the base model's
    # The best baseline at the budget, which the rest is against; None for that itself.
    baseline: str | None
    extra_hours: float | None  # hours of a run more than the baseline's
    extra_gain: Estimate | None  # nats below the baseline, paired by seed
    extra_points: ScoreDifference | None  # of score above the baseline

    def in_words(self, currency: str) -> dict[str, str]:
        """The cell of every column of the table; without a price a device-hour is the unit."""
        unit = currency if self.cost is not None else "hour"
        paid = self.hours if self.cost is None else self.cost
        price = paid / self.hours if self.hours > 0 else 0.0
        extra = None if self.extra_hours is None else self.extra_hours * price
        return {
            "method": self.method,
            "budget": f"{self.budget:,}",
            "device time": duration(3600 * self.hours),
            "cost": "–" if self.cost is None else f"{money(self.cost)} {currency}",
            "energy": "–" if self.energy_joules is None else energy(self.energy_joules),
            "minus the base": _joined(
                [
                    None if self.gain is None else f"{-self.gain:+.4f} nats",
                    None if self.points is None else f"{self.points:+.1f} points",
                ]
            ),
            f"gain per {unit}": _joined(
                [_rate(self.gain, paid, "nats"), _rate(self.points, paid, "points")]
            ),
            "against the best baseline": self._against(extra, unit),
        }

    def _against(self, extra: float | None, unit: str) -> str:
        """What more or less money than the best baseline's bought."""
        if self.baseline is None:
            return "is the best baseline"
        if extra is None or self.extra_gain is None:
            return f"{self.baseline}: no seed in common"
        # Differences are ours minus the other's, as everywhere; a rate is of what is gained.
        gains = [(self.extra_gain.mean, f"{-self.extra_gain.mean:+.4f} nats", "nats")]
        if (points := self.extra_points) is not None:
            gains.append((100 * points.change, f"{100 * points.change:+.1f} points", "points"))
        told = " and ".join(text for _, text, _ in gains)
        paid = f"{money(abs(extra))} {unit}"
        said = f"{self.baseline}: {told} for {paid} {'more' if extra > 0 else 'less'}"
        rates = [each for gain, _, name in gains if (each := _rate(gain, extra, name))]
        return f"{said}: {' and '.join(rates)} per {unit}" if rates else said


@dataclass(frozen=True)
class Smallest(Result):
    """The smallest adapter whose figure is within one standard error of the best one's."""

    measure: str  # what was compared: validation loss, or the score
    method: str
    budget: int
    trainable_parameters: int
    value: float  # its mean over seeds
    best: str  # the method with the best mean
    best_budget: int
    best_parameters: int  # what that one trains
    best_value: float
    standard_error: float  # of the best mean over its seeds

    def in_words(self) -> str:
        """One sentence."""
        best = (
            f"the best, {self.best} with {self.best_parameters:,}, has {self.best_value:.4f} ± "
            f"{self.standard_error:.4f}"
        )
        if (self.method, self.budget) == (self.best, self.best_budget):
            return (
                f"no smaller adapter is within one standard error of the best {self.measure}: "
                f"{best}"
            )
        return (
            f"the smallest adapter within one standard error of the best {self.measure}: "
            f"{self.method} with {self.trainable_parameters:,} parameters ({self.value:.4f}); "
            f"{best}"
        )


@dataclass(frozen=True)
class Spent(Result):
    """What the whole comparison took so far."""

    trials: int  # that are done
    device_seconds: float  # of all calls, with preparing, measuring and scoring
    trial_seconds: float  # mean device time of a trial
    price_per_hour: float | None  # of one device; None: not known
    energy_joules: float | None = None  # of the trials; None where one of them does not tell it
    money: float | None = None  # the budget of --money; None: without one

    def in_words(self, currency: str) -> str:
        """One sentence, and how many trials an amount of money buys."""
        trials = counted(self.trials, "trial")
        took = f"{trials}, {duration(self.device_seconds)} of device time in all"
        if self.energy_joules is not None:
            took += f", {energy(self.energy_joules)}"
        price = self.price_per_hour
        if price is None:
            return f"{took}, {duration(self.trial_seconds)} a trial; no price was given"
        cost, each = self.device_seconds / 3600 * price, self.trial_seconds / 3600 * price
        told = f"{took}, {money(cost)} {currency}; {money(each)} {currency} a trial"
        if self.money is not None:
            told += f"; the budget was {money(self.money)} {currency}"
        if each <= 0:
            return told
        amount = round_amount(each) if self.money is None else self.money
        return (
            f"{told}: {money(amount)} {currency} would pay for {int(amount / each):,} such trials"
        )


@dataclass(frozen=True)
class Claim(Result):
    """One claim about KPSVD, and what the trials say."""

    text: str
    verdict: str  # held, not held, or undecided
    figure: str  # the figures behind the verdict
    # Why such trials cannot decide it, whatever their figures are: one seed, or few steps.
    undecidable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recommendation(Result):
    """What to do on this data."""

    text: str  # the method with its size and rate, and why; or why none of them
    undecided: tuple[str, ...]  # what the trials leave open, each as the end of "not decided: ..."
    # Lines for the recipe, or PEFT's configuration where the method is a baseline of PEFT.
    lines: tuple[str, ...] = ()
    # What would decide what is open, each a sentence: seeds, rows, steps, rates, money.
    missing: tuple[str, ...] = ()


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
    returns: tuple[Return, ...] = ()  # cost and gain of a run of each summary
    smallest: Smallest | None = None  # None where one seed has no standard error
    spent: Spent | None = None  # None in verdicts of older versions
    task: str | None = None  # what --score judged by, and how it was asked; None: not scored
    base_score: float | None = None  # the base model's share of right answers
    score_differences: tuple[ScoreDifference, ...] = ()


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


def percent_plus_minus(found: Estimate) -> str:
    """A mean share with its deviation over seeds, in per cent."""
    spread = "" if found.deviation is None else f" ± {100 * found.deviation:.1f}"
    return f"{100 * found.mean:.1f}{spread} %"


def round_amount(each: float) -> float:
    """The least power of ten, from 1 on, that is ten times an amount or more."""
    return float(10 ** max(0, math.ceil(math.log10(10 * each))))


def _rate(gain: float | None, paid: float, name: str) -> str | None:
    """A gain for a unit of what was paid; None where nothing was gained or paid."""
    if gain is None or gain <= 0 or paid <= 0:
        return None
    rate = gain / paid
    return f"{rate:,.0f} {name}" if rate >= 1000 else f"{rate:.3g} {name}"


def _joined(parts: Sequence[str | None]) -> str:
    return ", ".join(each for each in parts if each) or "–"


def plus_minus(found: Estimate | None) -> str:
    """A mean with its deviation over seeds."""
    if found is None:
        return "–"
    return f"{found.mean:.4f}" + ("" if found.deviation is None else f" ± {found.deviation:.4f}")
