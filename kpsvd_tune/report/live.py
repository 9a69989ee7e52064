"""What a person sees while a command runs: stages, notes, progress, and the trials of a comparison.

All of it goes to stderr. Progress is a live bar or table on a terminal and plain lines otherwise.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from kpsvd_tune.report.alive import Heartbeat
from kpsvd_tune.report.comparison import Trial, TrialRow
from kpsvd_tune.report.console import preflight_lines, rank_summary
from kpsvd_tune.report.layout import make_console, print_line
from kpsvd_tune.report.results import Event, PreflightReport, RankReport, StepMetrics
from kpsvd_tune.units import counted, duration, time_left

# A log gets a line of progress at every tenth of the work, but not sooner than this after the last,
# and one at this interval where a tenth takes long.
PLAIN_SECONDS = 10.0
ALIVE_SECONDS = 60.0
# First words of stages that may say nothing for minutes; the others end with what they count.
_SILENT = (
    *("loading", "decomposing", "merging", "computing", "writing", "reading", "taking"),
    *("measuring", "scoring", "estimating", "tracing", "planning", "tokenising", "sending"),
)
# A log gets a line for each running trial at this interval.
TRIAL_SECONDS = 30.0
# Finished trials that the live table shows; the rest are counted.
_RECENT = 12


class ConsoleEvents(AbstractContextManager["ConsoleEvents", None]):
    """Shows what a command tells its events; silent on every rank but the first."""

    def __init__(self) -> None:
        self._main = os.environ.get("RANK", "0") == "0"
        self._console = make_console(stderr=True, quiet=not self._main, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._phase = ""
        self._last = 0.0
        # Tenths of the phase that were reported to the log.
        self._told = 0
        self._validated = -PLAIN_SECONDS
        # Number and time of the first training step that was seen here.
        self._first_step: tuple[int, float] | None = None
        self._alive = Heartbeat(self._still, ALIVE_SECONDS)

    def __exit__(self, *_: object) -> None:
        self.end_progress()
        self._alive.end()

    def stage(self, text: str) -> None:
        """Say what begins now, and once a minute that it still goes on, until there is progress."""
        self.end_progress()
        self._alive.end()
        print_line(self._console, Text(f"· {text}", style="bold"))
        if self._main and text.startswith(_SILENT):
            self._alive.begin(text)

    def _still(self, text: str) -> None:
        print_line(self._console, Text(f"  {text}", style="dim"), 4)

    def note(self, text: str) -> None:
        """Say a remark that belongs to the stage."""
        self.end_progress()
        print_line(self._console, Text(f"  {text}", style="dim"), 4)

    def tell(self, event: Event) -> None:
        """Show a warning or a fallback: what happened, and below it what to do."""
        self.end_progress()
        head = "warning: " if event.kind == "warning" else "fallback: "
        if event.step is not None:
            head += f"step {event.step}: "
        line = Text(f"  {head}{event.text}", style="yellow")
        print_line(self._console, line, 4)
        if rows := event.evidence.get("found"):
            print_line(self._console, Text(f"    found: {rows}", style="dim"), 6)
        if event.cure:
            print_line(self._console, f"    {event.cure}", 6)

    def preflight(self, report: PreflightReport) -> None:
        """Show what will be trained on, and one row with its trained tokens marked."""
        self.end_progress()
        for line in preflight_lines(report):
            print_line(self._console, f"  {line}", 4)
        if report.sample:
            sample = Text("  one row, trained tokens marked: ")
            for text, trained in report.sample:
                # Brackets as well as colour, for logs and for those who see no colour.
                sample.append(f"⟦{text}⟧" if trained else text, style="green" if trained else "dim")
            print_line(self._console, sample, 4)

    def ranks(self, report: RankReport) -> None:
        """Show the totals of the chosen ranks."""
        self.end_progress()
        for line in rank_summary(report):
            print_line(self._console, f"  {line}", 4)

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Report progress of a phase; a new phase begins a new bar.

        ``total`` is 0 where nobody knows it; ``detail`` has parts with commas between them.
        """
        if not self._main:
            return
        self._alive.end()
        now = time.monotonic()
        if phase != self._phase:
            self.end_progress()
            self._phase, self._last, self._told = phase, now, 0
        if self._console.is_terminal:
            self._bar(phase, done, total, detail)
            return
        tenth = 10 * done // total if total else 0
        waited = now - self._last
        if (done == total and tenth > self._told) or waited >= (
            PLAIN_SECONDS if tenth > self._told else ALIVE_SECONDS
        ):
            self._last, self._told = now, tenth
            count = f"{done:,} of {total:,}" if total else f"{done:,}"
            print_line(self._console, f"  {phase} {count}{', ' if detail else ''}{detail}")

    def step(self, metrics: StepMetrics, total: int) -> None:
        """Report one training step."""
        # The seconds of a run hold the validation before its first step, and those of a continued
        # run the steps of another day: only what was seen here tells the pace.
        if self._first_step is None or metrics.step <= self._first_step[0]:
            self._first_step = (metrics.step, metrics.seconds)
        number, seconds = self._first_step
        left = None
        if metrics.step > number:
            pace = (metrics.seconds - seconds) / (metrics.step - number)
            left = (total - metrics.step) * pace
        parts = [
            f"loss {metrics.loss:.4f}",
            f"rate {metrics.learning_rate:.2e}",
            f"{metrics.tokens_per_second:,.0f} tokens/s",
            time_left(left),
        ]
        self.advance("training", metrics.step, total, ", ".join(filter(None, parts)))
        if metrics.validation_loss is not None and self._main:
            self._validation(metrics.step, total, metrics.validation_loss)

    def _validation(self, step: int, total: int, loss: float) -> None:
        """Say what a validation found: each on a terminal, some in a log."""
        now = time.monotonic()
        is_due = step == total or now - self._validated >= PLAIN_SECONDS
        if self._console.is_terminal or is_due:
            self._validated = now
            print_line(self._console, f"  step {step}: validation loss {loss:.4f}")

    def end_progress(self) -> None:
        """Close the bar that is open, if any."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._phase = None, ""

    def _bar(self, phase: str, done: int, total: int, detail: str) -> None:
        width = self._console.width
        bar_width = 24 if width >= 100 else 10
        count = len(f"{done}/{total or '?'}")
        detail = fitting(detail, width - len(f"  {phase}   {count * ' '}") - bar_width)
        if self._progress is None:
            self._progress = Progress(
                TextColumn("  {task.description}", markup=False),
                BarColumn(bar_width=bar_width),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=self._console,
            )
            self._task = self._progress.add_task(phase, total=total or None, detail=detail)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total or None, detail=detail)


def fitting(detail: str, room: int) -> str:
    """The parts between commas that ``room`` columns hold; the last, the time left, is cut last."""
    parts = detail.split(", ")
    while len(", ".join(parts)) > room and parts:
        parts.pop(-2 if len(parts) > 1 else -1)
    return ", ".join(parts)


class TrialTable(AbstractContextManager["TrialTable", None]):
    """Shows trials as they run: a live table on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self._console = make_console(stderr=True, soft_wrap=True)
        self._live: Live | None = None
        self._rows: list[TrialRow] = []
        self._running: dict[Trial, tuple[int, int, float]] = {}
        self._since: dict[Trial, float] = {}
        # Each trial that runs, as "trial 2 of 4".
        self._names: dict[Trial, str] = {}
        self._num_left, self._jobs = 0, 1
        self._last = time.monotonic()
        # How many the models that are scored have given, in words.
        self._answers = ""

    def __exit__(self, *_: object) -> None:
        self.leave_table()

    def leave_table(self) -> None:
        """Go on in lines, below the table; any thread may ask for it."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def begin(self, rows: Sequence[TrialRow], num_left: int, jobs: int) -> None:
        """Show the trials that are done, and how many are to come, ``jobs`` at a time."""
        self._rows, self._num_left, self._jobs = list(rows), num_left, jobs
        if rows:
            are = "is" if len(rows) == 1 else "are"
            print_line(self._console, f"· {counted(len(rows), 'trial')} {are} done already")
        if self._console.is_terminal and os.environ.get("TERM") != "dumb":
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()

    def started(self, trial: Trial, number: int, total: int) -> None:
        """Report a trial that begins, or goes on: ``number`` of ``total``, counted from 1."""
        self._names[trial] = f"trial {number} of {total}"
        if self._live is None:
            print_line(self._console, f"· {self._named(trial)}")
            self._last = time.monotonic()
        self._show()

    def stepped(self, trial: Trial, step: int, total: int, loss: float) -> None:
        """Report one step of a trial that runs."""
        self._running[trial] = (step, total, loss)
        self._since.setdefault(trial, time.monotonic())
        self._show()

    def finished(self, row: TrialRow, num_left: int) -> None:
        """Report a trial that is done, and how many are to come."""
        self._num_left = num_left
        self._running.pop(row.trial, None)
        self._since.pop(row.trial, None)
        self._rows.append(row)
        if self._live is None:
            loss = "failed" if row.validation_loss is None else f"{row.validation_loss:.4f}"
            took = duration(row.wall_seconds)
            told = f"  {self._named(row.trial)}: validation loss {loss}, {took}"
            print_line(self._console, f"{told}; {self._standing()}")
        self._names.pop(row.trial, None)
        self._show()

    def answered(self, done: int, total: int) -> None:
        """Report how many answers the models that are scored have given, of all they are to."""
        self._answers = f"answers {done:,} of {total:,}"
        self._show()

    def note(self, text: str) -> None:
        """Say something between trials."""
        print_line(self._console, Text(f"  {text}", style="dim"), 4)

    def _named(self, trial: Trial) -> str:
        name = self._names.get(trial)
        return f"{trial}" if name is None else f"{name}: {trial}"

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
        # Another thread may end it meanwhile.
        if (shown := self._live) is not None:
            shown.update(self._table())
        elif time.monotonic() - self._last >= TRIAL_SECONDS:
            self._last = time.monotonic()
            left = time_left(self._seconds_left())
            for trial, (step, total, loss) in self._running.items():
                told = f"  {self._named(trial)}: step {step}/{total}, loss {loss:.3f}"
                print_line(self._console, told + (f"; all trials: {left}" if left else ""))
            if self._answers:
                print_line(self._console, f"  {self._answers}")

    def _table(self) -> Table:
        answers = [self._answers] if self._answers else []
        title = ", ".join([*self._names.values(), self._standing(), *answers])
        table = Table(box=None, pad_edge=False, padding=(0, 2), title=title)
        for name in ("method", "budget", "rate", "seed", "step", "loss", "validation"):
            table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
        for row in self._rows[-_RECENT:]:
            loss = "failed" if row.validation_loss is None else f"{row.validation_loss:.4f}"
            last = f"{row.losses[-1]:.3f}" if row.losses else "–"
            table.add_row(*_cells(row.trial), "done", last, loss)
        for trial in [each for each in self._names if each not in self._running]:
            table.add_row(*_cells(trial), "starts", "…", "…", style="bold")
        for trial, (step, total, now) in self._running.items():
            table.add_row(*_cells(trial), f"{step}/{total}", f"{now:.3f}", "…", style="bold")
        return table


def _cells(trial: Trial) -> tuple[str, ...]:
    return trial.method, f"{trial.budget:,}", f"{trial.learning_rate:g}", str(trial.seed)
