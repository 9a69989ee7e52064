"""Lines and tables: at no width is a figure cut, and what is left out is named."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from kpsvd_tune.report.layout import Column, output, print_line, print_table

COLUMNS = (
    Column("module", is_text=True),
    Column("shape", goes=1),
    Column("energy", goes=2),
    Column("params"),
)
ROWS = [
    ["model.layers.0.self_attn.q_proj", "4096x4096", "37.3 %", "1,234,567"],
    ["model.layers.0.[b]evil[/b]", "16x32", "5.0 %", "192"],
]


def console(width: int, *, terminal: bool = True) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=terminal, color_system=None), file


@pytest.mark.parametrize("width", [200, 100, 80, 62, 61, 52, 44, 43, 40, 32])
def test_a_table_loses_whole_columns_or_becomes_blocks(width: int):
    out, file = console(width)
    print_table(out, COLUMNS, ROWS, where="ranks.csv")
    shown = file.getvalue()
    assert "…" not in shown
    for row in ROWS:
        assert row[0] in shown
        assert row[-1] in shown
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    told = shown.partition("left out for want of width: ")[2]
    for place, name in ((1, "shape"), (2, "energy")):
        assert (ROWS[0][place] in shown) != (name in told)
    assert ("ranks.csv" in told) == bool(told)


def test_the_column_with_the_largest_number_goes_first():
    out, file = console(54)
    print_table(out, COLUMNS, ROWS, where="ranks.csv")
    assert "left out for want of width: energy; see ranks.csv" in file.getvalue()


def test_blocks_hold_every_cell_with_its_name():
    out, file = console(40)
    print_table(out, COLUMNS, ROWS)
    lines = file.getvalue().splitlines()
    assert lines[:3] == [
        "model.layers.0.self_attn.q_proj",
        "  shape 4096x4096 · energy 37.3 %",
        "  params 1,234,567",
    ]


def test_a_long_line_breaks_between_words_on_a_terminal_and_is_whole_in_a_file():
    text = "validation loss 5.1504 over 204 tokens, standard error 0.0110 [not markup]"
    out, file = console(40)
    print_line(out, text, 4)
    assert file.getvalue().splitlines() == [
        "validation loss 5.1504 over 204",
        "    tokens, standard error 0.0110 [not",
        "    markup]",
    ]
    out, file = console(40, terminal=False)
    print_line(out, text, 4)
    assert file.getvalue() == text + "\n"


def test_a_pipe_has_the_width_that_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output(140).width == 140
    monkeypatch.setenv("COLUMNS", "72")
    assert output(140).width == 72
