"""Differences of two methods of a comparison, seed by seed, with 95 % intervals.

Purpose: the table of claims of docs/study.md, for methods of unequal sizes and tasks whose measure
    is not the validation loss, which `kpsvd-tune compare` does not judge.
Needs: the results.jsonl of a comparison, or several files with trials of the same one.
Command: .venv/bin/python scripts/benchmarks/study/paired.py METHOD@RATE METHOD@RATE FILE...
    METHOD as `compare --methods` has it; the second one is the baseline.

Of each measure: the mean of the first, of the second, and first minus second over the seeds in
common. Loss is that of the held-out rows (test: of compare.test). Convergence is measured on the
training loss, as mean of windows of WINDOW steps: steps to the lowest window of the baseline with
the same seed; a run that never gets there counts all its steps. Steadiness is the variation of the
gradient's norm after the first twentieth of the steps, the warm-up of the study's recipes.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kpsvd_tune.comparison.statistics import estimate, steps_to, variation

WINDOW = 10
Row = dict[str, Any]


def read(files: Sequence[Path], wanted: str) -> dict[int, Row]:
    """The finished trials of METHOD@RATE, by seed; of the same trial the last line counts."""
    method, _, rate = wanted.rpartition("@")
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    found = {
        row["seed"]: row
        for row in rows
        if row["method"] == method and row["learning_rate"] == float(rate) and not row["failed"]
    }
    if not found:
        names = sorted({f"{row['method']}@{row['learning_rate']:g}" for row in rows})
        sys.exit(f"no finished trial of {wanted}; expected one of {', '.join(names)}")
    return found


def windows(row: Row) -> list[tuple[int, float]]:
    """Step and mean training loss of each full window."""
    losses = row["losses"]
    ends = range(WINDOW, len(losses) + 1, WINDOW)
    return [(end, statistics.fmean(losses[end - WINDOW : end])) for end in ends]


def steps_to_baseline(row: Row, baseline: Row) -> float:
    """Steps until the training loss of the first falls to the lowest of the baseline."""
    goal = min(loss for _, loss in windows(baseline))
    steps = steps_to(windows(row), goal)
    return float(len(row["losses"])) if steps is None else steps


def clipped(row: Row) -> float:
    """Share of the steps whose gradient was longer than 1, the limit of the study's recipes."""
    norms: list[float] = row["grad_norms"]
    return sum(norm > 1.0 for norm in norms) / len(norms)


MEASURES: dict[str, Callable[[Row, Row], float | None]] = {
    "loss": lambda row, _: row["validation_loss"],
    "test loss": lambda row, _: row["test_loss"],
    "forgetting": lambda row, _: row["forgetting"],
    "steps to the baseline's lowest training loss": steps_to_baseline,
    "variation of the gradient norm": lambda row, _: variation(
        row["grad_norms"], len(row["grad_norms"]) // 20
    ),
    "clipped steps": lambda row, _: clipped(row),
    "score": lambda row, _: (row.get("score") or {}).get("value"),
}


def main() -> None:
    """Read the files and print a line for each measure that all trials have."""
    names, files = sys.argv[1:3], [Path(each) for each in sys.argv[3:]]
    ours, other = (read(files, name) for name in names)
    seeds = sorted(ours.keys() & other.keys())
    sizes = [next(iter(rows.values()))["trainable_parameters"] for rows in (ours, other)]
    print(f"{sizes[0]:,} and {sizes[1]:,} trained parameters, seeds {seeds}\n")
    print("| measure | first | second | first minus second |\n|---|---|---|---|")
    for name, measure in MEASURES.items():
        values = [
            (measure(ours[seed], other[seed]), measure(other[seed], other[seed])) for seed in seeds
        ]
        known = [(own, theirs) for own, theirs in values if own is not None and theirs is not None]
        if not known or len(known) < len(values):
            continue
        change = estimate([own - theirs for own, theirs in known])
        means = [statistics.fmean(each) for each in zip(*known, strict=True)]
        print(
            f"| {name} | {means[0]:.4f} | {means[1]:.4f} | {change.mean:+.4f}, "
            f"{change.interval(4)} |"
        )


if __name__ == "__main__":
    main()
