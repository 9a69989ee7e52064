"""What a person sees while a command runs and when it is done.

Messages, progress and tables' captions go to stderr; a table that is the command's result goes
to stdout. Progress is a live bar on a terminal and plain lines otherwise.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from kpsvd_tune.report.results import (
    MergeReport,
    PreflightReport,
    RankReport,
    StepMetrics,
)
from kpsvd_tune.report.score import score_text, score_value
from kpsvd_tune.report.table import merge_lines, preflight_lines, rank_summary, rank_table

# Plain lines: one per this many seconds at most.
PLAIN_SECONDS = 5.0


class Events:
    """Receives what the pipeline reports; silent on every rank but the first."""

    def __init__(self) -> None:
        self._main = os.environ.get("RANK", "0") == "0"
        self._console = Console(stderr=True, quiet=not self._main, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._phase = ""
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end_progress()

    def stage(self, text: str) -> None:
        """Say what begins now."""
        self.end_progress()
        self._console.print(Text(f"· {text}", style="bold"))

    def note(self, text: str) -> None:
        """Say something in passing."""
        self.end_progress()
        self._console.print(Text(f"  {text}", style="dim"))

    def preflight(self, report: PreflightReport) -> None:
        """Show what will be trained on, and one row with its trained tokens marked."""
        self.end_progress()
        for line in preflight_lines(report):
            self._console.print(Text(f"  {line}"))
        if report.sample:
            sample = Text("  one row, trained tokens marked: ")
            for text, trained in report.sample:
                # Brackets as well as colour, for logs and for those who see no colour.
                sample.append(f"⟦{text}⟧" if trained else text, style="green" if trained else "dim")
            self._console.print(sample)

    def ranks(self, report: RankReport) -> None:
        """Show the totals of the chosen ranks."""
        self.end_progress()
        for line in rank_summary(report):
            self._console.print(Text(f"  {line}"))

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Report progress of a phase; a new phase begins a new bar."""
        if not self._main:
            return
        if phase != self._phase:
            self.end_progress()
            self._phase, self._last = phase, time.monotonic()
        if self._console.is_terminal:
            self._bar(phase, done, total, detail)
            return
        now = time.monotonic()
        if done == total or now - self._last >= PLAIN_SECONDS:
            self._last = now
            count = f"{done}/{total}" if total else f"{done:,}"
            self._console.print(Text(f"  {phase} {count} {detail}".rstrip()))

    def step(self, metrics: StepMetrics, total: int) -> None:
        """Report one training step."""
        left = (total - metrics.step) * metrics.seconds / max(1, metrics.step)
        detail = (
            f"loss {metrics.loss:.4f}  lr {metrics.learning_rate:.2e}  "
            f"{metrics.tokens_per_second:,.0f} tokens/s  {duration(left)} left"
        )
        self.advance("training", metrics.step, total, detail)
        if metrics.validation_loss is not None:
            self._console.print(
                Text(f"  step {metrics.step}: validation loss {metrics.validation_loss:.4f}")
            )

    def end_progress(self) -> None:
        """Close the bar that is open, if any."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._phase = None, ""

    def _bar(self, phase: str, done: int, total: int, detail: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(phase, total=total or None, detail=detail)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total or None, detail=detail)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _out() -> Console:
    console = Console(highlight=False)
    # A pipe has no width of its own; the tables are made for 100 columns.
    return console if console.is_terminal else Console(highlight=False, width=100)


def show_ranks(report: RankReport) -> None:
    """The rank table and its totals."""
    out = _out()
    out.print(rank_table(report))
    for line in rank_summary(report):
        out.print(Text(line))


def show_sweep(reports: Mapping[str, RankReport | Mapping[str, str]]) -> None:
    """Totals and spread of the ranks for every value tried; the reason where one is impossible."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in ("setting", "parameters", "energy", "adapted", "least", "median", "most"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    refused: list[str] = []
    for setting, report in reports.items():
        if not isinstance(report, RankReport):
            table.add_row(setting, "impossible")
            refused.append(f"{setting}: {report['error']}")
            continue
        ranks = [layer.rank for layer in report.layers]
        table.add_row(
            setting,
            f"{report.totals['trainable_parameters']:,}",
            f"{100 * report.totals['energy']:.1f}%",
            str(sum(rank > 0 for rank in ranks)),
            str(min(ranks)),
            f"{statistics.median(ranks):g}",
            str(max(ranks)),
        )
    out = _out()
    out.print(table)
    for line in refused:
        out.print(Text(line), soft_wrap=True)


def show_merge(report: MergeReport) -> None:
    """What the proof of the merge found."""
    for line in merge_lines(report):
        _out().print(line)


def show_plan(plan: Mapping[str, Any]) -> None:
    """What a run would do."""
    _show_mapping(plan)


def show_results(results: Mapping[str, Any]) -> None:
    """The results of a run: figures, then one line a score."""
    results = dict(results)
    scores, base = results.pop("scores", {}), results.pop("base_scores", {})
    results.pop("score_conditions", None)
    _show_mapping({k: v for k, v in results.items() if not isinstance(v, Mapping)})
    for task, by_scorer in scores.items():
        show_scores({"task": task, "scores": by_scorer})
    for task, by_scorer in base.items():
        show_scores({"task": f"{task}, base", "scores": by_scorer})
    for task, change in results.items():
        if isinstance(change, Mapping):
            scorer = next(iter(scores.get(task, {"": None})))
            before, after = (score_value(scorer, change[key]) for key in ("before", "after"))
            _line(f"{task}, change", f"{before} before training, {after} after")


def show_scores(result: Mapping[str, Any]) -> None:
    """One line a scorer of a task."""
    for scorer, score in result["scores"].items():
        _line(f"{result['task']}, {scorer}", score_text(scorer, score))


def show_run(run: Mapping[str, Any]) -> None:
    """A run again: its ranks, then its results."""
    if run["ranks"] is not None:
        show_ranks(RankReport.from_dict(run["ranks"]))
    show_results(run["results"] or {"results": "the run is not finished"})


def _show_mapping(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, bool):
            _line(key, "yes" if value else "no")
        elif isinstance(value, (int, float)):
            _line(key, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
        else:
            _line(key, str(value))


def _line(name: str, text: str) -> None:
    _out().print(Text(f"{name:<26} {text}"), soft_wrap=True)


def purpose(path: Path) -> str:
    """What the opening comment of a recipe says between "Purpose:" and "Needs:", on one line."""
    opening = path.read_text(encoding="utf-8").partition("# Needs:")[0]
    words = " ".join(line.lstrip("# ") for line in opening.splitlines())
    return words.removeprefix("Purpose: ")
