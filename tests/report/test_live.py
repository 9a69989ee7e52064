"""The live table of a comparison, and the lines that stand for it elsewhere."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console
from trial_rows import row

from kpsvd_tune import signals
from kpsvd_tune.report import live
from kpsvd_tune.report.comparison import Trial
from kpsvd_tune.report.console import show_grid
from kpsvd_tune.report.live import ConsoleEvents, TrialTable
from kpsvd_tune.report.results import Event


def test_lines_stand_for_the_table_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "TRIAL_SECONDS", 0.0)
    with TrialTable() as table:
        table.begin([row()], 5, 1)
        table.started(Trial("kpsvd", 100, 1e-3, 0), 2, 6)
        table.stepped(Trial("kpsvd", 100, 1e-3, 0), 3, 60, 1.234)
        table.finished(row("kpsvd", loss=0.5), 4)
        table.finished(row("pissa", loss=None, failed="diverged"), 3)
    shown = capsys.readouterr().err
    assert "1 trial is done already" in shown
    assert "· trial 2 of 6: kpsvd at 100, rate 0.001, seed 0\n" in shown
    assert (
        "  trial 2 of 6: kpsvd at 100, rate 0.001, seed 0: step 3/60, loss 1.234; "
        "all trials: 40 s left\n" in shown
    )
    assert (
        "trial 2 of 6: kpsvd at 100, rate 0.001, seed 0: validation loss 0.5000, 8 s; "
        "2 done, 4 to come, 32 s left\n" in shown
    )
    assert "pissa at 100, rate 0.001, seed 0: validation loss failed" in shown


def test_a_terminal_shows_running_and_finished_trials_in_one_table() -> None:
    table = TrialTable()
    out = io.StringIO()
    table._console = Console(file=out, force_terminal=True, width=120)
    with table:
        table.begin([], 4, 2)
        table.started(Trial("kpsvd", 100, 1e-3, 0), 1, 4)
        table.stepped(Trial("kpsvd", 100, 1e-3, 0), 3, 60, 1.234)
        table.started(row("lora").trial, 2, 4)
        assert "starts" in table._table().columns[4]._cells
        table.finished(row("lora", loss=0.75), 3)
        table.finished(row("pissa", loss=None), 2)
    shown = out.getvalue()
    for text in (
        "kpsvd",
        "3/60",
        "1.234",
        "0.7500",
        "failed",
        "trial 1 of 4, 2 done, 2 to come, 8 s left",
    ):
        assert text in shown


def test_answers_are_counted_in_the_title_of_the_table() -> None:
    table = TrialTable()
    table._console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with table:
        table.begin([row()], 0, 1)
        assert "answers" not in str(table._table().title)
        table.answered(1250, 2000)
        assert str(table._table().title).endswith("answers 1,250 of 2,000")


def test_the_answer_to_a_signal_is_not_drawn_over(monkeypatch: pytest.MonkeyPatch) -> None:
    table, out = TrialTable(), io.StringIO()
    table._console = Console(file=out, force_terminal=True, width=120)
    monkeypatch.setattr("kpsvd_tune.signals.os.write", lambda _, text: out.write(text.decode()))
    with table, signals.drawing(table.leave_table):
        table.begin([], 4, 1)
        table.stepped(Trial("kpsvd", 100, 1e-3, 0), 3, 60, 1.234)
        signals.tell("SIGINT: waiting")
        # What came meanwhile changes nothing above.
        table.stepped(Trial("kpsvd", 100, 1e-3, 0), 4, 60, 1.234)
        table.finished(row("lora", loss=0.75), 3)
    shown = out.getvalue()
    after = shown[shown.index("SIGINT: waiting") :]
    assert "lora" in after
    assert "\x1b[1A" not in after, "the lines above are wiped out"


def test_trials_that_start_keep_their_places() -> None:
    rates = [10.0**-number for number in range(1, 7)]
    with TrialTable() as table:
        for number, rate in enumerate(rates, start=1):
            table.started(Trial("kpsvd", 100, rate, 0), number, 6)
        table.stepped(Trial("kpsvd", 100, rates[0], 0), 3, 60, 1.234)
        shown = list(table._table().columns[2].cells)
    assert shown == [f"{rate:g}" for rate in [*rates[1:], rates[0]]]


def test_before_the_first_trial_is_done_its_steps_tell_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("kpsvd_tune.report.live.time.monotonic", lambda: now[0])
    with TrialTable() as table:
        table.begin([], 4, 2)
        trial = Trial("kpsvd", 100, 1e-3, 0)
        table.stepped(trial, 1, 10, 1.2)
        assert table._standing() == "0 done, 4 to come"
        now[0] = 4.0
        table.stepped(trial, 5, 10, 1.2)
        # 1 s a step, 10 steps a trial, half a trial done, two trials at a time.
        assert table._standing() == "0 done, 4 to come, 18 s left"


def test_a_grid_is_shown_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_grid({"methods": ["a", "b"], "learning_rates": [0.1], "trials": 4})
    assert capsys.readouterr().out.splitlines() == [
        "methods                    a, b",
        "learning rates             0.1",
        "trials                     4",
    ]


def test_a_warning_is_shown_with_its_step_what_was_found_and_its_cure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ConsoleEvents() as events:
        events.tell(
            Event("t", "warning", "Rows are cut.", "x", 7, {"found": "row 3"}, "Raise the limit.")
        )
        events.tell(Event("t", "fallback", "Went back.", "lower_rate"))
    assert capsys.readouterr().err == (
        "  warning: step 7: Rows are cut.\n    found: row 3\n    Raise the limit.\n"
        "  fallback: Went back.\n"
    )


def test_a_silent_stage_gives_a_sign_of_life(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "ALIVE_SECONDS", 0.05)
    with ConsoleEvents() as events:
        events.stage("loading a/model")
        time.sleep(0.3)
        events.note("a note")
        said = capsys.readouterr().err.splitlines()
        assert said[0] == "· loading a/model"
        assert said[1].startswith("  still loading a/model, 0.")
        # Progress has signs of its own.
        events.advance("answering", 1, 10)
        capsys.readouterr()
        time.sleep(0.2)
        assert capsys.readouterr().err == ""
        events.stage("training for 10 steps")
        time.sleep(0.2)
        assert capsys.readouterr().err == "· training for 10 steps\n"
        # Processes of their own measure it, and say nothing here.
        events.stage("measuring the base model")
        time.sleep(0.2)
        assert "  still measuring the base model, 0." in capsys.readouterr().err
        events.stage("reading a/file")
    time.sleep(0.2)
    assert "still" not in capsys.readouterr().err
