"""Reads events.jsonl, the stream of what happened in a run, as the report and a resumed run do."""

from __future__ import annotations

from pathlib import Path

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.results import Event
from kpsvd_tune.storage.json_files import parse_json, read_bytes

EVENTS_FILE = "events.jsonl"


def read_events(run: Path) -> tuple[Event, ...]:
    """Every event of a run's folder in the order told; empty for a run of an older version.

    A last line without an end, which a kill can leave, is no event yet and is left out.

    Raises:
        InputError: The file cannot be read, or one of its lines is not an event.
    """
    file = run / EVENTS_FILE
    if not file.exists():
        return ()
    try:
        *lines, _ = read_bytes(file).split(b"\n")
    except OSError as error:
        raise InputError(
            f"{file} cannot be read: {error.strerror or error}; make it readable, or move it away"
        ) from error
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(Event.from_dict(parse_json(line)))
        except (ValueError, InputError) as error:
            raise InputError(
                f"{file}:{number}: {error}; restore the file from a copy, or move it away"
            ) from error
    return tuple(events)
