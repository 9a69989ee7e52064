"""A comparison on the console: the live table of its trials, and the verdict's tables."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.live import Live
from rich.table import Table
from rich.text import Text

from kpsvd_tune.report.comparison import Comparison, Estimate, MethodSummary, TrialRow
from kpsvd_tune.report.layout import (
    Column,
    make_console,
    output,
    print_blocks,
    print_line,
    print_pair,
    print_table,
)
from kpsvd_tune.units import duration, time_left

PLAIN_SECONDS = 30.0
# Holds the whole table.
_WIDE = 140
# Below this width a row of the table is written as a block, which leaves nothing out.
_NARROW = 100
_COLUMNS = (
    Column("method", is_text=True),
    Column("budget"),
    Column("trained", goes=1),
    Column("rate"),
    Column("validation loss"),
    Column("test loss"),
    Column("steps to ref.", goes=2),
    Column("grad. CV", goes=5),
    Column("clipped", goes=4),
    Column("forgetting"),
    Column("s/step", goes=3),
)
# Finished trials that the live table shows; the rest are counted.
_RECENT = 12


class _Trial(Protocol):
    """What a table says of a trial that runs."""

    @property
    def method(self) -> str: ...
    @property
    def budget(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def seed(self) -> int: ...


class TrialTable:
    """Shows trials as they run: a live table on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self._console = make_console(stderr=True, soft_wrap=True)
        self._live: Live | None = None
        self._rows: list[TrialRow] = []
        self._running: dict[tuple[Any, ...], tuple[int, int, float]] = {}
        self._since: dict[tuple[Any, ...], float] = {}
        self._num_left, self._jobs = 0, 1
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, rows: Sequence[TrialRow], num_left: int, jobs: int) -> None:
        """Show the trials that are done already.

        Args:
            rows: Those.
            num_left: Trials that are to come.
            jobs: Trials at a time.
        """
        self._rows, self._num_left, self._jobs = list(rows), num_left, jobs
        if rows:
            print_line(self._console, f"· {len(rows)} trials are done already")
        if self._console.is_terminal and os.environ.get("TERM") != "dumb":
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()

    def stepped(self, trial: _Trial, step: int, total: int, loss: float) -> None:
        """Report one step of a trial that runs."""
        key = (trial.method, trial.budget, trial.learning_rate, trial.seed)
        self._running[key] = (step, total, loss)
        self._since.setdefault(key, time.monotonic())
        self._show()

    def finished(self, row: TrialRow, num_left: int) -> None:
        """Report a trial that is done, and how many are to come."""
        self._num_left = num_left
        key = (row.method, row.budget, row.learning_rate, row.seed)
        self._running.pop(key, None)
        self._since.pop(key, None)
        self._rows.append(row)
        if self._live is None:
            loss = "failed" if row.validation_loss is None else f"{row.validation_loss:.4f}"
            print_line(
                self._console,
                f"  {row.method} at {row.budget:,}, rate {row.learning_rate:g}, seed {row.seed}: "
                f"validation loss {loss}, {duration(row.wall_seconds)}; {self._standing()}",
            )
        self._show()

    def _standing(self) -> str:
        """How many trials are done and to come, and how long those take."""
        told = f"{len(self._rows)} done, {self._num_left} to come"
        left = time_left(self._seconds_left())
        return f"{told}, {left}" if left else told

    def _seconds_left(self) -> float | None:
        """By the trials that are done; before the first one by the steps of those that run."""
        parts = [step / total for step, total, _ in self._running.values()]
        if self._rows:
            each = statistics.fmean(row.wall_seconds for row in self._rows)
        elif self._running:
            now = time.monotonic()
            # The first step starts the clock.
            rates = [
                (now - self._since[key]) * total / (step - 1)
                for key, (step, total, _) in self._running.items()
                if step > 1
            ]
            if not rates:
                return None
            each = statistics.fmean(rates)
        else:
            return None
        return max(self._num_left - sum(parts), 0.0) * each / min(self._jobs, self._num_left or 1)

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._table())
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            for (method, _, rate, seed), (step, total, loss) in self._running.items():
                print_line(
                    self._console,
                    f"  {method}, rate {rate:g}, seed {seed}: step {step}/{total}, loss {loss:.3f}",
                )

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2), title=self._standing())
        for name in ("method", "budget", "rate", "seed", "step", "loss", "validation"):
            table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
        for row in self._rows[-_RECENT:]:
            loss = "failed" if row.validation_loss is None else f"{row.validation_loss:.4f}"
            last = f"{row.losses[-1]:.3f}" if row.losses else "–"
            table.add_row(
                *(row.method, f"{row.budget:,}", f"{row.learning_rate:g}", str(row.seed)),
                *("done", last, loss),
            )
        for (method, budget, rate, seed), (step, total, now) in self._running.items():
            table.add_row(
                *(method, f"{budget:,}", f"{rate:g}", str(seed)),
                *(f"{step}/{total}", f"{now:.3f}", "…"),
                style="bold",
            )
        return table


def show_grid(grid: Mapping[str, Any]) -> None:
    """What a comparison would run."""
    for key, value in grid.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        print_pair(output(), key.replace("_", " "), shown)


def show_comparison(verdict: Comparison) -> None:
    """What is recommended, the table of the methods, then claims and notes."""
    out = output(pipe_width=_WIDE)
    print_line(out, Text(verdict.recommendation.text, style="bold"))
    for each in verdict.recommendation.undecided:
        print_line(out, f"not decided: {each}")
    out.print()
    rows = [_cells(summary) for summary in verdict.summaries]
    if out.width < _NARROW:
        print_blocks(out, _COLUMNS, rows)
    else:
        print_table(out, _COLUMNS, rows, where="comparison.html")
    for pair in verdict.differences:
        if pair.budget == pair.other_budget:
            print_line(
                out,
                f"{pair.method} minus {pair.other} at {pair.budget:,}: {pair.loss.mean:+.4f} nats"
                f"{interval(pair.loss)}",
            )
    for claim in verdict.claims:
        print_line(out, f"{claim.verdict}: {claim.text}. {claim.figure}")
    for note in verdict.notes:
        print_line(out, f"note: {note}")


def _cells(summary: MethodSummary) -> list[str]:
    steps = summary.steps_to_reference
    return [
        summary.method,
        f"{summary.budget:,}",
        f"{summary.trainable_parameters:,}",
        f"{summary.learning_rate:g}{' (edge)' if summary.is_edge else ''}",
        plus_minus(summary.validation_loss),
        plus_minus(summary.test_loss),
        steps_reached(steps, summary.validation_loss.n),
        f"{summary.gradient_variation.mean:.2f}",
        f"{summary.clipped_share:.0%}",
        "–" if summary.forgetting is None else f"{summary.forgetting.mean:+.4f}",
        f"{summary.seconds_per_step:.2f}",
    ]


def steps_reached(steps: Estimate | None, num_seeds: int) -> str:
    """Mean steps to a loss, with the seeds that got there where not all did."""
    if steps is None:
        return "–"
    return f"{steps.mean:.0f}" + ("" if steps.n == num_seeds else f" ({steps.n} of {num_seeds})")


def plus_minus(found: Estimate | None) -> str:
    """A mean with its deviation over seeds."""
    if found is None:
        return "–"
    spread = "" if found.deviation is None else f" ± {found.deviation:.4f}"
    return f"{found.mean:.4f}{spread}"


def interval(found: Estimate) -> str:
    """The confidence interval of a difference, in brackets."""
    if found.low is None or found.high is None:
        return " (one seed)"
    return f" (95 % interval {found.low:+.4f} to {found.high:+.4f}, n = {found.n})"
