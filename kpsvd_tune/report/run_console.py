"""The report of a run in the terminal and as JSON."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from kpsvd_tune.report.console import preflight_lines, show_run
from kpsvd_tune.report.layout import Column, output, print_line, print_pairs, print_table
from kpsvd_tune.report.live_page import PAGE
from kpsvd_tune.report.run_files import RunFiles, gold_text, read_answers
from kpsvd_tune.report.run_words import (
    CURVE_COLUMNS,
    cost_lines,
    curve_rows,
    series,
    share_text,
    sparkline,
    state_line,
    told_events,
)
from kpsvd_tune.units import counted

_SPARK_WIDTH = 48
_LEARNED = 3
_EVENTS = 12
# Questions of each task that are shown with their answers, and letters of each line.
_ANSWERS = 2
_ANSWER_WIDTH = 200
# Figures of results.json that have a section of their own here.
_OF_COST = (
    *("wall_seconds", "device_seconds", "earlier_device_seconds", "cost", "currency"),
    "energy_joules",
    "peak_memory_bytes",
)


def told(run: RunFiles) -> dict[str, Any]:
    """The report of a run as JSON has it."""
    learned = run.learned
    return {
        "run": str(run.folder),
        "state": run.state,
        "ranks": run.ranks,
        "results": dict(run.results) or None,
        "metrics": list(run.metrics),
        "learned": None
        if learned is None
        else {
            "step": learned.step,
            "layers": [{**each.to_dict(), "share": each.share} for each in learned.layers],
        },
        "events": [each.to_dict() for each in run.events],
        "preflight": None if run.preflight is None else run.preflight.to_dict(),
        "record": {key: value for key, value in run.record.items() if key != "identity"},
        "recipe": dict(run.recipe) or None,
        "faults": list(run.faults),
    }


def show_run_report(run: RunFiles, *, layers: bool = False) -> None:
    """How a run stands, its results, its curve, what moved most, and what was warned of."""
    out = output()
    style = {"finished": "green", "failed": "bold red"}.get(run.state, "yellow")
    print_line(out, Text(f"{run.name}: {state_line(run)}", style=style))
    results = {key: each for key, each in run.results.items() if key not in _OF_COST}
    show_run({"ranks": run.ranks, "results": results or None}, layers=layers)
    rows = curve_rows(run)
    if rows:
        out.print()
        columns = [
            Column(name, goes=goes)
            for name, goes in zip(CURVE_COLUMNS, (0, 0, 0, 2, 1), strict=True)
        ]
        print_table(out, columns, rows, where=f"{run.folder / 'metrics.jsonl'}")
        _, values = series(run.metrics, "loss")
        if len(values) > 1 and _shows_bars():
            print_line(out, f"train loss {sparkline(values, _SPARK_WIDTH)}")
        out.print()
    if run.learned is not None and (most := run.learned.most()):
        for name, chosen in (("moved most", most[:_LEARNED]), ("moved least", most[-1:])):
            shown = ", ".join(f"{each.name} {share_text(each)}" for each in chosen)
            print_line(out, f"{name} (update / weight): {shown}", 4)
    if run.preflight is not None:
        for line in preflight_lines(run.preflight)[:2]:
            print_line(out, line, 4)
    print_line(out, Text("what it cost", style="bold"))
    print_pairs(cost_lines(run))
    warned = told_events(run.events)
    for event in warned[:_EVENTS]:
        step = "" if event.step is None else f", step {event.step:,}"
        cure = f" {event.cure}" if event.cure else ""
        line = f"{event.code or event.kind}{step}: {event.text}{cure}"
        print_line(out, Text(line, style="yellow"), 4)
    if len(warned) > _EVENTS:
        print_line(out, f"and {len(warned) - _EVENTS} more in {run.folder / 'events.jsonl'}")
    for fault in run.faults:
        print_line(out, Text(f"not read: {fault}", style="yellow"), 4)
    _show_answers(out, run)
    page = run.folder / PAGE
    hint = f"page: {page}" if page.exists() else "--html writes all of it as a page"
    print_line(out, Text(hint, style="dim"))


def _show_answers(out: Console, run: RunFiles) -> None:
    """The first questions of each task, with the answers before and after below each other."""
    for task in read_answers(run.folder, _ANSWERS):
        print_line(out, f"{task.task}, the first of {counted(task.num_questions, 'answer')}:")
        for one in task.shown:
            sides = {
                "asked": one["question"],
                "expected": gold_text(one["gold"]),
                "base model": one["before"],
                "adapter": one["after"],
            }
            for name, text in sides.items():
                if text is not None:
                    line = " ".join(str(text).split())
                    cut = line if len(line) <= _ANSWER_WIDTH else f"{line[:_ANSWER_WIDTH]} ..."
                    print_line(out, f"  {name}: {cut}", 6)


def _shows_bars() -> bool:
    """Whether the output's encoding has the block characters."""
    try:
        sparkline([0.0, 1.0], 2).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
