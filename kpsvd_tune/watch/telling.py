"""Makes the events that a run tells, with the time of now."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from kpsvd_tune.report.results import Event


def warning(
    code: str, text: str, cure: str, step: int | None = None, **evidence: int | float | str
) -> Event:
    """What looks wrong; each code is told once in a run."""
    return event("warning", text, code, step, evidence, cure)


def fallback(
    code: str, text: str, cure: str, step: int | None = None, **evidence: int | float | str
) -> Event:
    """What was done in place of what was asked for; each one is told."""
    return event("fallback", text, code, step, evidence, cure)


def event(
    kind: Literal["stage", "note", "warning", "fallback", "end"],
    text: str,
    code: str = "",
    step: int | None = None,
    evidence: Mapping[str, int | float | str] | None = None,
    cure: str = "",
) -> Event:
    """An event of any kind; numbers of the evidence have six significant digits."""
    rounded = {
        key: float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in (evidence or {}).items()
    }
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    return Event(time, kind, text, code, step, rounded, cure)
