"""A comparison on the console: the live table of its trials, and the verdict's tables."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kpsvd_tune.report.comparison import Comparison, Estimate, MethodSummary, TrialRow

PLAIN_SECONDS = 30.0
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
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._rows: list[TrialRow] = []
        self._running: dict[tuple[Any, ...], tuple[int, int, float]] = {}
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

    def begin(self, rows: Sequence[TrialRow]) -> None:
        """Show the trials that are done already."""
        self._rows = list(rows)
        if rows:
            self._console.print(Text(f"· {len(rows)} trials are done already"))
        if self._console.is_terminal and os.environ.get("TERM") != "dumb":
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()

    def stepped(self, trial: _Trial, step: int, total: int, loss: float) -> None:
        """Report one step of a trial that runs."""
        key = (trial.method, trial.budget, trial.learning_rate, trial.seed)
        self._running[key] = (step, total, loss)
        self._show()

    def finished(self, row: TrialRow) -> None:
        """Report a trial that is done."""
        self._running.pop((row.method, row.budget, row.learning_rate, row.seed), None)
        self._rows.append(row)
        if self._live is None:
            loss = "failed" if row.validation_loss is None else f"{row.validation_loss:.4f}"
            self._console.print(
                Text(
                    f"  {row.method} at {row.budget:,}, rate {row.learning_rate:g}, seed "
                    f"{row.seed}: validation loss {loss}, {row.wall_seconds:.0f} s"
                )
            )
        self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._table())
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            for (method, _, rate, seed), (step, total, loss) in self._running.items():
                text = (
                    f"  {method}, rate {rate:g}, seed {seed}: step {step}/{total}, loss {loss:.3f}"
                )
                self._console.print(Text(text))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2), title=f"{len(self._rows)} done")
        for name in ("method", "budget", "rate", "seed", "step", "loss", "validation"):
            table.add_column(name, justify="left" if name == "method" else "right")
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
        Console(highlight=False).print(Text(f"{key:<26} {shown}"), soft_wrap=True)


def show_comparison(verdict: Comparison) -> None:
    """The tables of a verdict, then its claims and notes."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=140)
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    columns = (
        *("method", "budget", "trained", "rate", "validation loss", "test loss"),
        *("steps to ref.", "grad. CV", "clipped", "forgetting", "s/step"),
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    for summary in verdict.summaries:
        table.add_row(*_cells(summary))
    out.print(table)
    for each in verdict.differences:
        if each.budget == each.other_budget:
            out.print(
                Text(
                    f"{each.method} minus {each.other} at {each.budget:,}: "
                    f"{each.loss.mean:+.4f} nats{interval(each.loss)}"
                )
            )
    for claim in verdict.claims:
        out.print(Text(f"{claim.verdict}: {claim.text}. {claim.figure}"))
    for note in verdict.notes:
        out.print(Text(f"note: {note}"))


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
