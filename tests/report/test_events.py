"""The reader of events.jsonl."""

from __future__ import annotations

import json

import pytest

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.events import read_events
from kpsvd_tune.report.results import Event

LINE = {"time": "2026-01-02T03:04:05+00:00", "kind": "note", "text": "x"}


def test_a_run_without_the_file_has_no_events(tmp_path):
    assert read_events(tmp_path) == ()


def test_events_come_in_their_order_and_half_a_line_is_none_yet(tmp_path):
    lines = [json.dumps(LINE | {"text": text}) for text in ("one", "two", "three")]
    (tmp_path / "events.jsonl").write_text("\n".join(lines)[:-3])
    told = [Event(time=LINE["time"], kind="note", text=text) for text in ("one", "two")]
    assert read_events(tmp_path) == tuple(told)


@pytest.mark.parametrize("line", ["{", "[]", '{"time": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "events.jsonl").write_text(f"{json.dumps(LINE)}\n{line}\n")
    with pytest.raises(InputError, match=r"events.jsonl:2: .*restore the file from a copy"):
        read_events(tmp_path)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(InputError, match=r"events.jsonl cannot be read: it is a folder"):
        read_events(tmp_path)
