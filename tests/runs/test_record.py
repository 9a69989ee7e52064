"""What a run tells lies in its events.jsonl once, whatever stops and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.report.events import read_events
from kpsvd_tune.report.results import Event, PreflightReport, RankReport, StepMetrics
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.record import RunEvents
from kpsvd_tune.watch.telling import fallback, warning


class Shown:
    """Remembers what was shown."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def stage(self, text: str) -> None:
        self.said.append(text)

    def note(self, text: str) -> None:
        self.said.append(text)

    def tell(self, event: Event) -> None:
        self.said.append(event.code)

    def preflight(self, report: PreflightReport) -> None:
        self.said.append("preflight")

    def ranks(self, report: RankReport) -> None:
        self.said.append("ranks")

    def step(self, metrics: StepMetrics, total: int) -> None:
        self.said.append("step")

    def advance(self, phase: str, done: int, total: int, detail: str = "") -> None:
        self.said.append("advance")

    def end_progress(self) -> None:
        self.said.append("end")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


def session(run: RunDirectory, *, is_main: bool = True) -> tuple[RunEvents, Shown]:
    shown = Shown()
    return RunEvents(shown, run, is_main=is_main), shown


def spike(step: int) -> Event:
    return warning("loss_spike", f"The loss jumped at {step}.", "Lower the rate.", step, loss=3.0)


def told(run: RunDirectory) -> list[str]:
    return [event.code or event.text for event in read_events(run.path)]


def test_what_is_told_before_the_run_begins_is_written_when_it_does(run):
    events, shown = session(run)
    events.stage("reading rows")
    report = PreflightReport(1, 0, 1, 1, 0, 0, 1, "text", "", ("pad is end",))
    events.preflight(report)
    events.tell(warning("truncated_rows", "Rows are cut.", "Raise it."))
    assert not run.events_file.exists()
    events.begin({})
    events.tell(spike(3))
    assert told(run) == ["reading rows", "pad is end", "truncated_rows", "loss_spike"]
    assert shown.said == ["reading rows", "preflight", "truncated_rows", "loss_spike"]


def test_a_session_that_never_begins_leaves_nothing(run):
    events, _ = session(run)
    events.note("finished; nothing was done")
    events.ended("Ended.")
    assert not run.events_file.exists()


def test_a_resumed_run_tells_nothing_twice(run):
    first, _ = session(run)
    first.begin({})
    first.stage("training")
    first.tell(spike(3))
    first.tell(spike(5))
    first.tell(fallback("lower_rate", "Going back.", "", 5))
    first.ended("Stopped by a signal.")
    second, shown = session(run)
    second.begin({})
    second.stage("training")
    second.tell(spike(4))
    second.tell(fallback("lower_rate", "Going back.", "", 5))
    second.tell(fallback("lower_rate", "Going back.", "", 9))
    assert told(run) == [
        "training",
        "loss_spike",
        "lower_rate",
        "Stopped by a signal.",
        "lower_rate",
    ]
    assert shown.said == ["training", "lower_rate"]


def test_after_a_change_of_settings_a_warning_may_be_told_again(run):
    first, _ = session(run)
    first.begin({})
    first.tell(spike(3))
    second, _ = session(run)
    second.begin({"train.learning_rate": "0.1 -> 0.01"})
    second.tell(spike(7))
    third, _ = session(run)
    third.begin({})
    third.tell(spike(8))
    changed = "Going on with train.learning_rate 0.1 -> 0.01."
    assert told(run) == ["loss_spike", changed, "loss_spike"]
    # Back and forth again: the third change has the words of the first.
    for change in ("0.01 -> 0.1", "0.1 -> 0.01"):
        again, _ = session(run)
        again.begin({"train.learning_rate": change})
    again.tell(spike(9))
    assert told(run)[-2:] == [changed, "loss_spike"]


def test_what_was_told_before_the_file_was_read_is_marked_once(run):
    for marks in (["few_steps"], []):
        events, _ = session(run)
        events.tell(warning("few_steps", "One step.", "Train longer."))
        events.begin({})
        marked: list[Event] = []
        events.mark_with(marked.append)
        assert [event.code for event in marked] == marks


def test_trackers_get_a_mark_of_what_this_session_told(run):
    events, _ = session(run)
    events.tell(warning("few_steps", "One step.", "Train longer."))
    events.begin({})
    marked: list[str] = []
    events.mark_with(lambda event: marked.append(event.code))
    events.tell(spike(3))
    events.tell(spike(4))
    assert marked == ["few_steps", "loss_spike"]


def test_other_processes_only_show(run):
    events, shown = session(run, is_main=False)
    events.begin({})
    events.stage("training")
    events.tell(spike(3))
    events.ended("Done.")
    assert not run.events_file.exists()
    assert shown.said == ["training"]


def test_a_damaged_file_does_not_stop_a_run(run, caplog):
    run.events_file.write_text("{\n")
    events, _ = session(run)
    events.begin({})
    events.tell(spike(3))
    assert "what was told before may be told again" in caplog.text
    assert run.events_file.read_text().count("\n") == 2


def test_progress_is_passed_on(run):
    events, shown = session(run)
    events.ranks(RankReport("m", {}, ()))
    events.step(StepMetrics(1, 0.1, 2.0, 1e-3, 1.0, 1, 1.0, 1.0), 2)
    events.advance("x", 1, 2)
    events.end_progress()
    assert shown.said == ["ranks", "step", "advance", "end"]
