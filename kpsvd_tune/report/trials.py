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

from kpsvd_tune.report.comparison import Comparison, TrialRow
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
# What a column shows, and its title here, which is short.
_COLUMNS = {
    "method": Column("method", is_text=True),
    "budget": Column("budget"),
    "trained": Column("trained", goes=1),
    "rate": Column("rate"),
    "validation loss": Column("validation loss"),
    "test loss": Column("test loss"),
    "steps to reference": Column("steps to ref.", goes=2),
    "gradient CV": Column("grad. CV", goes=5),
    "clipped": Column("clipped", goes=4),
    "forgetting": Column("forgetting"),
    "time a step": Column("step time", goes=3),
}
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
            took = duration(row.wall_seconds)
            told = f"  {row.name}: validation loss {loss}, {took}; {self._standing()}"
            print_line(self._console, told)
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
    found = [summary.in_words() for summary in verdict.summaries]
    columns, rows = list(_COLUMNS.values()), [[cells[key] for key in _COLUMNS] for cells in found]
    if out.width < _NARROW:
        print_blocks(out, columns, rows)
    else:
        print_table(out, columns, rows, where="comparison.html")
    for pair in verdict.differences:
        if pair.budget == pair.other_budget:
            print_line(
                out,
                f"{pair.method} minus {pair.other} at {pair.budget:,}: {pair.loss.mean:+.4f} nats "
                f"({pair.loss.interval()})",
            )
    for claim in verdict.claims:
        print_line(out, f"{claim.verdict}: {claim.text}. {claim.figure}")
    for note in verdict.notes:
        print_line(out, f"note: {note}")
