"""How lines and tables fit a console: nothing is cut, whatever the width.

A line breaks between words on a terminal and stays whole elsewhere, so that logs can be searched
line by line. A table that is too wide leaves out whole columns, and says which, or becomes one
block a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A pipe has no width of its own.
PIPE_WIDTH = 100
_GAP = 2
# Of a message; what is longer keeps this much of its start and of its end.
_LONGEST_LINE, _KEPT = 2000, 800
# Room for the names in front of values.
_NAME_WIDTH = 26
# On a console that leaves less for the text of a line, the terminal breaks it where it likes.
_LEAST_ROOM = 20


@dataclass(frozen=True)
class Column:
    """A column of a table.

    ``goes`` orders what is left out where the width does not hold all columns: the largest number
    first, and a column with 0 never.
    """

    name: str
    is_text: bool = False  # aligned to the left, as words are
    goes: int = 0
    style: str = ""  # of its cells


def make_console(**options: Any) -> Console:
    """A console of rich that prints text as it is: names may hold [brackets] and :colons:."""
    return Console(**{"highlight": False, "markup": False, "emoji": False, **options})


def output(pipe_width: int = PIPE_WIDTH) -> Console:
    """The standard output; ``pipe_width`` columns wide where it is no terminal."""
    console = make_console()
    if console.is_terminal or os.environ.get("COLUMNS", "").isdigit():
        return console
    return make_console(width=pipe_width)


def shortened(text: str) -> str:
    """Each line with its middle left out where it is longer than anyone reads.

    A message may list what a file holds, and a file may hold two hundred thousand columns. What is
    wrong is said at the start, and what to do at the end.
    """
    return "\n".join(
        line
        if len(line) <= _LONGEST_LINE
        else f"{line[:_KEPT]} ... {len(line) - 2 * _KEPT:,} characters ... {line[-_KEPT:]}"
        for line in text.split("\n")
    )


def print_line(out: Console, text: Text | str, indent: int = 2) -> None:
    """Print a line as it is; a terminal's continuation lines begin ``indent`` columns further."""
    _print_hanging(out, "", text if isinstance(text, Text) else Text(text), indent)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and their values on the standard output; the values are aligned."""
    out = output()
    for name, value in pairs:
        start = f"{name:<{_NAME_WIDTH}} "
        _print_hanging(out, start, Text(value), len(start))


def _print_hanging(out: Console, start: str, text: Text, indent: int) -> None:
    room = out.width - indent
    longest = max((cell_len(each) for each in text.plain.split("\n")), default=0)
    if not out.is_terminal or cell_len(start) + longest <= out.width or room < _LEAST_ROOM:
        out.print(Text(start) + text, soft_wrap=True)
        return
    for number, piece in enumerate(text.wrap(out, room)):
        piece.rstrip()
        out.print(Text(" " * indent if number else start) + piece, soft_wrap=True)


def print_table(
    out: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, where: str = ""
) -> None:
    """Print rows below titles, with as many of the columns as the width holds.

    ``where`` says what holds those left out. Where the columns that must stay are too wide, every
    row becomes a block.
    """
    widths = [
        max(cell_len(text) for text in (column.name, *(row[place] for row in rows)))
        for place, column in enumerate(columns)
    ]
    shown = list(range(len(columns)))
    order = sorted((p for p in shown if columns[p].goes), key=lambda p: -columns[p].goes)
    while order and _width(widths, shown) > out.width:
        shown.remove(order.pop(0))
    if _width(widths, shown) > out.width:
        print_blocks(out, columns, rows)
        return
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for place in shown:
        column = columns[place]
        table.add_column(
            column.name,
            justify="left" if column.is_text else "right",
            style=column.style,
            no_wrap=True,
            min_width=widths[place],
        )
    for row in rows:
        table.add_row(*(Text(row[place]) for place in shown))
    out.print(table)
    if len(shown) < len(columns):
        names = ", ".join(each.name for p, each in enumerate(columns) if p not in shown)
        print_line(out, Text(f"left out for want of width: {names}; see {where}", style="dim"))


def print_blocks(out: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as a block: its first cell as a title, the others with their names below."""
    for row in rows:
        print_line(out, Text(row[0], style="bold"))
        line = ""
        for column, cell in zip(columns[1:], row[1:], strict=True):
            pair = f"{column.name} {cell}"
            if line and cell_len(line) + len(" · ") + cell_len(pair) > out.width:
                print_line(out, line, 4)
                line = ""
            line = f"{line} · {pair}" if line else f"  {pair}"
        print_line(out, line, 4)


def _width(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[place] for place in shown) + _GAP * (len(shown) - 1)
