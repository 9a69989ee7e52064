"""What a person sees while a command runs and when it is done.

Messages, progress and tables' captions go to stderr; a table that is the command's result goes
to stdout. Progress is a live bar on a terminal and plain lines otherwise.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from kpsvd_tune.report.layout import (
    Column,
    make_console,
    output,
    print_line,
    print_pair,
    print_table,
)
from kpsvd_tune.report.results import (
    LayerReport,
    MergeReport,
    PreflightReport,
    RankReport,
    StepMetrics,
)
from kpsvd_tune.report.run import (
    figures,
    result_figures,
    score_lines,
    score_text,
    score_value,
)
from kpsvd_tune.units import time_left

# A log gets a line of progress at every tenth of the work, but not sooner than this after the last,
# and one at this interval where a tenth takes long.
PLAIN_SECONDS = 10.0
ALIVE_SECONDS = 60.0
# The summary names at most this many matrices.
LISTED = 3
_SOURCES = 20
RANK_COLUMNS = (
    Column("module", is_text=True),
    Column("out x in", goes=1),
    Column("A", goes=4),
    Column("B", goes=5),
    Column("energy", goes=2),
    Column("elbow", goes=3),
    Column("rank", style="bold"),
    Column("bound by", is_text=True),
    Column("kept"),
    Column("params"),
)


class Events:
    """Receives what the pipeline reports; silent on every rank but the first."""

    def __init__(self) -> None:
        self._main = os.environ.get("RANK", "0") == "0"
        self._console = make_console(stderr=True, quiet=not self._main, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._phase = ""
        self._last = 0.0
        # Tenths of the phase that the log has heard of.
        self._told = 0
        self._validated = -PLAIN_SECONDS
        # Number and time of the first training step that was seen here.
        self._first_step: tuple[int, float] | None = None

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
        print_line(self._console, Text(f"· {text}", style="bold"))

    def note(self, text: str) -> None:
        """Say something in passing."""
        self.end_progress()
        print_line(self._console, Text(f"  {text}", style="dim"), 4)

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

        Args:
            phase: What is done.
            done: How much of it is.
            total: How much there is; 0 where nobody knows.
            detail: What else is worth knowing, in parts with commas between them.
        """
        if not self._main:
            return
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
    """As many of the parts between commas as there is room for, and the last of all first.

    Args:
        detail: The parts; the time left comes last.
        room: Columns.
    """
    parts = detail.split(", ")
    while len(", ".join(parts)) > room and parts:
        parts.pop(-2 if len(parts) > 1 else -1)
    return ", ".join(parts)


def show_ranks(report: RankReport) -> None:
    """The rank table and its totals."""
    out = output()
    print_table(out, RANK_COLUMNS, rank_rows(report), where="rank_report.csv")
    for line in rank_summary(report):
        print_line(out, line)


def show_sweep(reports: Mapping[str, RankReport | Mapping[str, str]]) -> None:
    """Totals and spread of the ranks for every value tried; the reason where one is impossible."""
    columns = [Column("setting", is_text=True)]
    names = ("parameters", "energy", "adapted", "least", "median", "most")
    columns += [Column(name) for name in names]
    rows: list[list[str]] = []
    refused: list[str] = []
    for setting, report in reports.items():
        if not isinstance(report, RankReport):
            rows.append([setting, "impossible", *[""] * 5])
            refused.append(f"{setting}: {report['error']}")
            continue
        ranks = [layer.rank for layer in report.layers]
        rows.append(
            [
                setting,
                f"{report.totals['trainable_parameters']:,}",
                f"{100 * report.totals['energy']:.1f} %",
                str(sum(rank > 0 for rank in ranks)),
                str(min(ranks)),
                f"{statistics.median(ranks):g}",
                str(max(ranks)),
            ]
        )
    out = output()
    print_table(out, columns, rows)
    for line in refused:
        print_line(out, line)


def show_merge(report: MergeReport) -> None:
    """What the proof of the merge found."""
    for line in merge_lines(report):
        print_line(output(), line)


def show_plan(plan: Mapping[str, Any]) -> None:
    """What a run would do."""
    _show_pairs(figures(plan))


def show_results(results: Mapping[str, Any]) -> None:
    """The results of a run: its figures, then a line for every score of the base and the adapter.

    Args:
        results: The content of results.json.
    """
    scores = results.get("scores", {})
    _show_pairs(result_figures(results))
    for line in score_lines(results):
        _show_score(f"{line.model}, {line.name}", line.scorer, line.score, line.conditions)
    for task, change in results.items():
        if isinstance(change, Mapping) and "before" in change:
            scorer = next(iter(scores.get(task, {"": None})))
            before, after = (score_value(scorer, change[key]) for key in ("before", "after"))
            print_pair(
                output(),
                f"{task}, in this training",
                f"{before} before, {after} after, of {change['n']}",
            )


def show_scores(result: Mapping[str, Any]) -> None:
    """One line for every scorer of a task."""
    name = ", ".join(filter(None, (result.get("model"), result["task"])))
    for scorer, score in result["scores"].items():
        _show_score(name, scorer, score, result.get("conditions"))


def _show_score(name: str, scorer: str, score: Mapping[str, Any], conditions: str | None) -> None:
    # Each line says how it was asked: lines are quoted one by one.
    asked = f"; {conditions}" if conditions else ""
    print_line(output(), f"{name}, {scorer}: {score_text(scorer, score)}{asked}", 4)


def show_run(run: Mapping[str, Any], *, layers: bool = False) -> None:
    """A run again: its results, the totals of its ranks, and every layer where that was asked for.

    Args:
        run: What `read_run` gave.
        layers: Show the rank of every layer too.
    """
    show_results(run["results"] or {"results": "the run is not finished"})
    if run["ranks"] is None:
        return
    report = RankReport.from_dict(run["ranks"])
    if layers:
        show_ranks(report)
        return
    for line in rank_summary(report):
        print_line(output(), line)
    print_line(output(), Text("--layers shows the rank of every layer", style="dim"))


def _show_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    out = output()
    for name, text in pairs:
        print_pair(out, name, text)


def purpose(path: Path) -> str:
    """What the opening comment of a recipe says between "Purpose:" and "Needs:", on one line."""
    opening = path.read_text(encoding="utf-8").partition("# Needs:")[0]
    words = " ".join(line.lstrip("# ") for line in opening.splitlines())
    return words.removeprefix("Purpose: ")


def rank_rows(report: RankReport) -> list[tuple[str, ...]]:
    """The rank of every layer, a cell for each of RANK_COLUMNS."""
    return [_cells(layer) for layer in report.layers]


def _cells(layer: LayerReport) -> tuple[str, ...]:
    m, n, p, q = layer.factor_shape
    return (
        layer.name,
        f"{layer.out_features}x{layer.in_features}",
        f"{m},{n}",
        f"{p},{q}",
        str(layer.rank_energy),
        str(layer.rank_elbow),
        str(layer.rank),
        layer.bound_by,
        f"{100 * layer.energy_total:.1f} %",
        f"{layer.parameters:,}",
    )


def rank_summary(report: RankReport) -> list[str]:
    """The totals below the table, one line each."""
    totals = report.totals
    ranks = [layer.rank for layer in report.layers]
    adapted = sum(rank > 0 for rank in ranks)
    lora = sum(layer.out_features + layer.in_features for layer in report.layers if layer.rank > 0)
    lines = [
        f"{len(report.layers)} matrices, {adapted} adapted; ranks {min(ranks, default=0)} to "
        f"{max(ranks, default=0)}, mean {sum(ranks) / max(1, len(ranks)):.2f}",
        f"{totals['trainable_parameters']:,} trainable parameters; offsets and frozen factors are "
        f"stored, twice as many; LoRA of rank 1 on the same layers: {lora:,}",
        f"the chosen terms hold {100 * totals['energy']:.1f} % of the pooled window's energy",
    ]
    lines += [
        f"probe of energy {probe.energy:g}: {probe.parameters:,} parameters, validation loss "
        f"{probe.loss_before:.4f} to {probe.loss:.4f} in {probe.steps} steps"
        for probe in report.probes
    ]
    if report.untouched:
        names = [f"{name} ({reason})" for name, reason in report.untouched[:LISTED]]
        more = "; all of them: rank_report.json" if len(report.untouched) > LISTED else ""
        lines.append(
            f"{len(report.untouched)} weight matrices left alone: {', '.join(names)}{more}"
        )
    notes = sum(bool(layer.note) for layer in report.layers)
    if notes:
        lines.append(f"{notes} layers with a note (a rule fell back): see rank_report.json")
    return lines


def preflight_lines(report: PreflightReport) -> list[str]:
    """What will be trained on, before it is."""
    lines = [
        f"{report.num_rows:,} training rows, {report.num_validation_rows:,} validation rows "
        f"({report.format}: {report.format_reason})",
        f"{report.num_tokens:,} tokens, {report.num_supervised_tokens:,} supervised; "
        f"{report.num_truncated:,} rows cut, {report.num_dropped:,} dropped; longest "
        f"{report.max_tokens} tokens",
    ]
    for each in report.sources[:_SOURCES]:
        lines.append(
            f"{each.source} ({each.format}, weight {each.weight:g}): {each.num_rows:,} rows, "
            f"{each.num_supervised_tokens:,} supervised tokens an epoch"
        )
    if len(report.sources) > _SOURCES:
        lines.append(f"and {len(report.sources) - _SOURCES} more sources")
    return lines + [f"note: {warning}" for warning in report.warnings]


def merge_lines(report: MergeReport) -> list[Text]:
    """What the proof of a merge found."""
    verdict = "equal" if report.passed else "NOT equal"
    lines = [
        Text(
            f"merged and adapter-on-base are {verdict}: largest logit difference "
            f"{report.max_logit_difference:.3g} (tolerance {report.tolerance:g}), top-1 agreement "
            f"{100 * report.top1_agreement:.1f} %",
            style="green" if report.passed else "bold red",
        )
    ]
    if report.adapter_logit_difference is not None:
        lines.append(
            Text(
                "the adapter changes a logit of its base by at most "
                f"{report.adapter_logit_difference:.3g}"
            )
        )
    lines.append(
        Text(
            f"of every layer's update at least {100 * report.min_kept_share:.1f} % survived the "
            f"rounding to {report.dtype}"
        )
    )
    return lines + [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
