"""Two runs side by side in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from kpsvd_tune.report.layout import Column, output, print_line, print_table
from kpsvd_tune.report.pair import Pair, ScoreDifference
from kpsvd_tune.report.run import score_value

_LONGEST_VALUE = 60


def show_pair(pair: Pair) -> None:
    """Key figures, scores, the curve, then what differs."""
    out = output()
    first, second = pair.names
    print_line(out, Text(f"{first}: {pair.states[0]}", style="bold"))
    print_line(out, Text(f"{second}: {pair.states[1]}", style="bold"))
    _table(out, pair, "", pair.figures, "")
    for each in pair.scores:
        name, one, other, difference, words = score_cells(each)
        print_line(out, f"{name}: {one} and {other}, difference {difference}; {words}", 4)
    if not pair.scores:
        print_line(out, "the two have no score in common")
    out.print()
    if pair.curve:
        columns = [Column("step"), Column(first), Column(second), Column("second - first")]
        print_line(out, Text(f"{pair.curve_name} at common steps", style="bold"))
        print_table(out, columns, curve_cells(pair))
    else:
        print_line(out, "the two have no logged step in common")
    _table(out, pair, "what differs in the recipe", pair.recipe, "nothing but output_dir")
    _table(out, pair, "what differs in versions and devices", pair.versions, "nothing")
    _table(out, pair, "rows and base model", pair.made_of, "not known")
    for note in pair.notes:
        print_line(out, f"note: {note}")


def score_cells(each: ScoreDifference) -> tuple[str, str, str, str, str]:
    """Name, both values, the difference with its standard error, and what it rests on."""
    name = each.name if each.name == each.scorer else f"{each.name}, {each.scorer}"
    values = [score_value(each.scorer, value) for value in (each.first, each.second)]
    scale, unit, digits = (1, "", 4) if each.is_loss else (100, " points", 1)
    difference = f"{scale * each.difference:+.{digits}f}"
    if each.stderr is not None:
        difference += f" ± {scale * each.stderr:.{digits}f}"
    difference += unit
    return name, values[0], values[1], difference, f"{each.verdict}; {each.how}"


def curve_cells(pair: Pair) -> list[tuple[str, str, str, str]]:
    """Step, both losses, and the second minus the first."""
    return [
        (f"{step:,}", f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}")
        for step, one, other in pair.curve
    ]


def _table(
    out: Console, pair: Pair, title: str, rows: Sequence[tuple[str, str, str]], none: str
) -> None:
    out.print()
    if not rows:
        print_line(out, f"{title}: {none}")
        return
    if title:
        print_line(out, Text(title, style="bold"))
    columns = [Column("", is_text=True), *(Column(name, is_text=True) for name in pair.names)]
    cells = [[name, *(_cut(value) for value in values)] for name, *values in rows]
    print_table(out, columns, cells)


def _cut(value: str) -> str:
    if len(value) <= _LONGEST_VALUE:
        return value
    half = (_LONGEST_VALUE - 1) // 2
    return f"{value[:half]}…{value[-half:]}"
